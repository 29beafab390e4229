"""Where pretrained weights come from: located, downloaded, converted and loaded."""
