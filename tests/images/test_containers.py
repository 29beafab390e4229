"""Images work for any user; runs in containers give the same results and report every failure."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipelines import cli
from slam_asr import __version__
from slam_asr.artifacts.stage_record import follow_pointer, read_record
from slam_asr.steps import IMAGES, OWN_IMAGE, STEPS
from slam_asr.storage import allow_readers, walk
from tests.docker_engine import BUILD_OPTIONS, NoEngine, install
from tests.images.test_images import WITHOUT_TORCH, lock, third_party

CHECKOUT = Path(__file__).resolve().parents[2]
NOWHERE = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), "http://127.0.0.1:9")
FAILURES, SHORT = (30, 300) if os.environ.get("SLAM_ASR_SOAK") else (2, 10)
"""Number of failing runs, and of containers that end as soon as they start; the tests run them one by one."""
ONE_BY_ONE = ("build-manifest", "extract-features", "train")
"""Stages that run with `--only` and without a network, before a complete pipeline reuses their results."""
if os.environ.get("SLAM_ASR_SOAK"):
    ONE_BY_ONE += ("convert-checkpoint", "decode", "score")


def command(*options: object) -> list[str]:
    return [sys.executable, "-m", "pipelines", "run", *map(str, options), "--runner", "docker"]


def containers() -> list[str]:
    """Return the ids of all containers of runs, including finished ones."""
    return subprocess.run(
        ["docker", "ps", "--all", "--quiet", "--filter", "label=slam-asr.run"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()


@pytest.fixture
def offline(monkeypatch, images):
    """Use the test images without access to the hub, and with proxies that block all but local addresses."""
    for name, value in {
        **NOWHERE,
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
        "HF_HUB_OFFLINE": "1",
        "SLAM_ASR_IMAGES": images,
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")


@pytest.fixture
def real_speech(libri_mini, tmp_path) -> Path:
    """Up to six utterances each of train, dev and test, in the layout of LibriSpeech."""
    for subset, source in (
        ("train-tiny", "train-clean-100"),
        ("dev-tiny", "test-other"),
        ("test-tiny", "test-other"),
    ):
        chapters = sorted((libri_mini / source).glob("*/*"))
        chapter = chapters[-1] if subset == "test-tiny" else chapters[0]
        target = tmp_path / "speech" / subset / chapter.relative_to(libri_mini / source)
        target.mkdir(parents=True)
        [transcript] = chapter.glob("*.trans.txt")
        lines = transcript.read_text().splitlines()[:6]
        (target / transcript.name).write_text("\n".join(lines) + "\n")
        for line in lines:
            shutil.copy(chapter / f"{line.split()[0]}.flac", target)
    return tmp_path / "speech"


@pytest.mark.slow
def test_complete_pipeline_on_real_speech_with_object_storage_on_the_host(
    offline, bucket, tiny_recipe, real_speech, tmp_path
):
    output = tmp_path / "run"
    options = [
        tiny_recipe,
        "--corpus",
        real_speech,
        "--output",
        output,
        "--store",
        "s3://bucket/docker",
        "--data.max_duration",
        "40",
    ]
    done = subprocess.run(command(*options), cwd=CHECKOUT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "6/6 score" in done.stdout and "\nWER " in done.stdout
    names = [f.name for f in walk("s3://bucket/docker")]
    for expected in (
        "train.jsonl",
        "projector.safetensors",
        "report.html",
        "curves.html",
        "hypotheses.jsonl",
    ):
        assert any(name.endswith(expected) for name in names), expected
    for text in (done.stdout, done.stderr, (output / "kfp.log").read_text()):
        assert "a-secret-that-nobody-may-see" not in text
    assert containers() == []


@pytest.mark.slow
def test_single_stages_on_local_paths_without_a_network(offline, tiny_recipe, tiny_corpus, tmp_path):
    common = [tiny_recipe, "--output", tmp_path / "run", "--network", "none", "--shared-memory", "256m"]
    for stage in ONE_BY_ONE:
        corpus = ["--corpus", tiny_corpus] if stage == "build-manifest" else []
        done = subprocess.run(
            command(*common, *corpus, "--only", stage), cwd=CHECKOUT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        record = read_record(follow_pointer(tmp_path / "run" / "results" / f"{stage}.json"))
        assert record.stage == stage
    assert containers() == []
    # The complete pipeline, now in processes, reuses the results of the containers.
    rest = [
        argument
        for argument in command(tiny_recipe, "--corpus", tiny_corpus, "--output", tmp_path / "run")
        if argument not in ("--runner", "docker")
    ]
    done = subprocess.run(rest, cwd=CHECKOUT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("already there, nothing to do") == len(ONE_BY_ONE)
    assert len(list((tmp_path / "run" / "store" / "score").glob("*/report.html"))) == 1


@pytest.mark.slow
def test_one_stage_by_hand_as_a_user_unknown_to_the_image(images, tiny_recipe, tiny_corpus, tmp_path):
    output = tmp_path / "output"
    output.mkdir()
    os.chown(output, 4242, 4343)
    for folder in (tmp_path, tiny_corpus, tiny_recipe.parent):
        for path in (folder, *folder.parents):
            if path.is_relative_to("/tmp") and path != Path("/tmp"):
                path.chmod(0o755)
    done = subprocess.run(
        [
            "docker",
            "run",
            "--rm",
            "--network",
            "none",
            "--user",
            "4242:4343",
            "--volume",
            f"{tiny_corpus}:/corpus:ro",
            "--volume",
            f"{tiny_recipe.parent}:/recipe:ro",
            "--volume",
            f"{output}:/output",
            images.replace("{stage}", "build-manifest"),
            "slam-asr",
            "build-manifest",
            "--recipe",
            "/recipe/tiny.yaml",
            "--corpus",
            "/corpus",
            "--output",
            "/output/manifests",
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    written = [f for f in output.rglob("*") if f.is_file()]
    assert {f.name for f in written} >= {"train.jsonl", "test.jsonl", "statistics.html", "stage.json"}
    assert {f.stat().st_uid for f in written} == {4242}


@pytest.mark.slow
def test_all_steps_run_with_a_read_only_root_filesystem(
    images, tiny_models, tiny_recipe, tiny_corpus, tmp_path
):
    """Each step of the training pipeline, as the image's user, writes only its output and files in /tmp."""
    os.chown(tmp_path, 1000, 1000)
    folders = [tiny_corpus, tiny_recipe.parent, Path(tiny_models["llm"]).parent]
    for folder in (tmp_path, *folders):
        for path in (folder, *folder.parents):
            if path.is_relative_to("/tmp") and path != Path("/tmp"):
                path.chmod(0o755)
        allow_readers(folder)
    recipe, manifests, features = f"--recipe {tiny_recipe}", f"{tmp_path}/manifests", f"{tmp_path}/features"
    steps = {
        "build-manifest": f"{recipe} --corpus {tiny_corpus} --output {manifests}",
        "extract-features": f"{recipe} --manifests {manifests} --output {features}",
        "train": f"{recipe} --train-manifest {manifests}/train.jsonl --dev-manifest {manifests}/dev.jsonl "
        f"--feature-store {features} --output {tmp_path}/train",
        "convert-checkpoint": f"--checkpoint {tmp_path}/train --output {tmp_path}/model",
        "decode": f"--model {tmp_path}/model --manifests {manifests} --feature-store {features} "
        f"--output {tmp_path}/decoded",
        "score": f"--model {tmp_path}/model --parts {tmp_path}/decoded --output {tmp_path}/report",
    }
    volumes = [f"--volume={tmp_path}:{tmp_path}", *(f"--volume={f}:{f}:ro" for f in folders)]
    options = ["--rm", "--read-only", "--tmpfs=/tmp", "--user=1000", "--network=none", "--cap-drop=ALL"]
    for step, arguments in steps.items():
        image = images.replace("{stage}", STEPS[step].image or step)
        done = subprocess.run(
            ["docker", "run", *options, *volumes, image, "slam-asr", step, *arguments.split()],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert "Read-only file system" not in done.stdout + done.stderr
    assert (tmp_path / "report" / "report.html").is_file()


@pytest.mark.slow
def test_failing_stage_fails_the_run_every_time(offline, tiny_recipe, tiny_corpus, tmp_path):
    for number in range(FAILURES):
        options = [
            tiny_recipe,
            "--corpus",
            tiny_corpus,
            "--output",
            tmp_path / str(number),
            "--data.test",
            "[no-such-subset]",
        ]
        done = subprocess.run(command(*options), cwd=CHECKOUT, capture_output=True, text=True)
        assert done.returncode == 2, done.stdout + done.stderr
        assert (
            "slam-asr: error: " in done.stdout
            and "no-such-subset" in done.stdout
            and "Traceback" not in done.stdout + done.stderr
        )
        assert done.stderr.startswith("slam-asr: step build-manifest stopped at the error above")
    assert containers() == []


@pytest.mark.slow
def test_exit_code_and_last_line_of_a_short_container_are_never_lost(images, tmp_path):
    from pipelines.docker import Containers, Settings

    image = images.replace("{stage}", "build-manifest")
    with Containers(Settings(network="none"), str(tmp_path), [tmp_path], []) as engine:
        for number in range(SHORT):
            lines = []
            code = engine.run(
                "decode", image, ["sh", "-c", f"echo last wörds; exit {number % 2 * 7}"], lines.append
            )
            assert (code, lines) == (number % 2 * 7, ["last wörds\n"])
    assert containers() == []


@pytest.mark.slow
def test_interrupted_run_leaves_no_container(offline, tiny_recipe, tiny_corpus, tmp_path):
    options = [tiny_recipe, "--corpus", tiny_corpus, "--output", tmp_path / "run"]
    process = subprocess.Popen(
        command(*options), cwd=CHECKOUT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    for line in process.stdout:
        if line.startswith("2/6"):
            break
    deadline = time.monotonic() + 30
    while not containers() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert containers()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=90)
    assert process.returncode == 130
    assert errors.splitlines()[-1] == "slam-asr: error: interrupted; run the same command again to resume"
    assert containers() == []


@pytest.mark.slow
def test_next_run_removes_the_containers_of_a_killed_run(images, tmp_path):
    from pipelines.docker import LABEL, Containers, Settings

    image = images.replace("{stage}", "build-manifest")
    for run in (str(tmp_path), "another run"):
        subprocess.run(
            [
                "docker",
                "run",
                "--detach",
                "--network",
                "none",
                "--label",
                f"{LABEL}={run}",
                image,
                "sleep",
                "300",
            ],
            check=True,
            capture_output=True,
        )
    [_, other] = sorted(
        containers(),
        key=lambda c: (
            "another" in subprocess.run(["docker", "inspect", c], capture_output=True, text=True).stdout
        ),
    )
    with Containers(Settings(network="none"), str(tmp_path), [tmp_path], []):
        assert containers() == [other]
    subprocess.run(["docker", "rm", "--force", other], check=True, capture_output=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            ["--images", "no-such/{stage}:1"],
            "The Docker engine has no image no-such/build-manifest:1 for build-manifest: `make images`",
        ),
        (
            ["--images", "localhost:9/{stage}:1"],
            "localhost:9/build-manifest:1, the image of build-manifest, cannot be pulled",
        ),
        (["--gpus", "all"], "--gpus is all, but the Docker engine has no GPU"),
        (["--gpus", "many"], "--gpus is many: give auto, all, none or a number."),
        (["--network", "no-such"], "The Docker engine has no network no-such: give --network one of"),
        (["--mounts", "[/no/such]"], "/no/such does not exist and cannot be mounted"),
        (["--only", "decode"], "decode needs the result of build-manifest, and "),
    ],
)
def test_options_that_cannot_work_are_rejected_before_anything_starts(
    docker_engine, monkeypatch, images, tiny_recipe, tiny_corpus, tmp_path, capsys, options, sentence
):
    monkeypatch.setenv("SLAM_ASR_IMAGES", images)
    given = [
        "run",
        str(tiny_recipe),
        "--corpus",
        str(tiny_corpus),
        "--output",
        str(tmp_path),
        "--runner",
        "docker",
        *options,
    ]
    with pytest.raises(SystemExit) as exit_info:
        cli.main(given)
    assert exit_info.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.removeprefix("slam-asr: error: ").startswith(sentence)
    assert containers() == []


def test_missing_engine_and_unknown_stage_are_refused_in_one_sentence(
    monkeypatch, tiny_recipe, tiny_corpus, tmp_path, capsys
):
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/nothing.sock")
    for options, sentence in (
        ([], "The Docker engine does not answer ("),
        (["--only", "trian"], "There is no stage trian: --only may be build-manifest, "),
    ):
        with pytest.raises(SystemExit):
            cli.main(
                [
                    "run",
                    str(tiny_recipe),
                    "--corpus",
                    str(tiny_corpus),
                    "--output",
                    str(tmp_path / "run"),
                    "--runner",
                    "docker",
                    *options,
                ]
            )
        [line] = capsys.readouterr().err.splitlines()
        assert line.removeprefix("slam-asr: error: ").startswith(sentence)
    assert not (tmp_path / "run").exists()


def test_credential_files_are_mounted_and_our_own_folders_are_not_passed_on(monkeypatch, tmp_path):
    from pipelines.docker import _credential_files, _environment

    for name in list(os.environ):
        if name.startswith(("AWS_", "SLAM_ASR_")):
            monkeypatch.delenv(name)
    (tmp_path / "token").write_text("t")
    (tmp_path / "credentials").write_text("c")
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(tmp_path / "token"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "no-config"))
    monkeypatch.setenv("HF_HOME", "/here")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("SLAM_ASR_CACHE", "/here")
    monkeypatch.setenv("https_proxy", "http://proxy")
    environment, files = _environment(), _credential_files()
    assert environment["AWS_WEB_IDENTITY_TOKEN_FILE"] == files[str(tmp_path / "token")]
    assert environment["AWS_SHARED_CREDENTIALS_FILE"] == files[str(tmp_path / "credentials")]
    assert "AWS_CONFIG_FILE" not in environment and str(tmp_path / "no-config") not in files
    assert environment["HF_HUB_OFFLINE"] == "1" and environment["https_proxy"] == "http://proxy"
    assert not {"HF_HOME", "SLAM_ASR_CACHE", "HOME", "PATH"} & environment.keys()


@pytest.fixture
def inside(images):
    """Return a function that runs a command in a stage's image, without a network.

    By default, it runs as a user who does not exist in the image.
    """

    def run(stage: str, *command: str, user: str = "4242:4343") -> str:
        options = ["--rm", "--network", "none", "--user", user, "--env", "_KFP_RUNTIME=true"]
        done = subprocess.run(
            ["docker", "run", *options, images.replace("{stage}", stage), *command],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


@pytest.mark.slow
@pytest.mark.parametrize("stage", IMAGES)
def test_image_reports_its_version_and_contains_all_its_imports(stage, inside, images):
    line = inside(stage, "slam-asr", "--version")
    assert re.fullmatch(
        rf"slam-asr {__version__} \(commit [0-9a-f]+\+?\), (no torch|torch 2[\d.]+\+cpu, CUDA none)\n", line
    )
    assert ("no torch" in line) == (stage in WITHOUT_TORCH)
    packages = sorted(third_party(lock.STAGES[stage]).keys() - lock.OURS)
    inside(stage, "python3", "-c", f"import {', '.join(packages)}")
    about = json.loads(
        subprocess.run(
            ["docker", "inspect", images.replace("{stage}", stage)],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
    )[0]
    assert not about["Config"]["Entrypoint"] and about["Config"]["User"] == "1000"


@pytest.mark.slow
@pytest.mark.parametrize("user", ["1000", "4242:4343"])
def test_any_user_may_write_where_a_step_writes(user, inside):
    script = (
        'touch /minio/x /s3/x /gcs/x "$SLAM_ASR_CACHE"/models/x "$HOME"/x '
        '&& python3 -c "import getpass; print(getpass.getuser())" && id -u'
    )
    assert inside("build-manifest", "sh", "-c", script, user=user).split() == ["slam", user.partition(":")[0]]


@pytest.mark.slow
def test_image_list_is_readable_for_compile(images, tmp_path):
    from components import images as images_of

    image_of = images_of(str(CHECKOUT / "build" / "images.yaml"))
    assert {stage: image_of[stage] for stage in OWN_IMAGE} == {
        stage: f"slam-asr/{stage}:test" for stage in OWN_IMAGE
    }


@pytest.fixture
def registry(docker_engine, tmp_path):
    """Start a local registry of images, and return its name."""
    try:
        install(["docker-registry"], ["docker-registry"])
    except NoEngine as reason:
        pytest.skip(f"needs a registry of images to push to: {reason}")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        name = f"127.0.0.1:{free.getsockname()[1]}"
    (tmp_path / "registry.yml").write_text(
        f"version: 0.1\nlog: {{level: error}}\nhttp: {{addr: '{name}'}}\n"
        f"storage: {{filesystem: {{rootdirectory: {tmp_path}/registry}}}}\n"
    )
    server = subprocess.Popen(
        ["docker-registry", "serve", str(tmp_path / "registry.yml")],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            socket.create_connection(("127.0.0.1", int(name.partition(":")[2])), 1).close()
            break
        except OSError:
            time.sleep(0.1)
    yield name
    server.terminate()
    server.wait()


@pytest.mark.slow
def test_pushed_images_are_listed_by_digest_and_found_by_doctor(images, registry):
    from pipelines.kubeflow.registry import check_images

    image_list = CHECKOUT / "build" / "images.yaml"
    before = image_list.read_text()
    name = f"{registry}/team/build-manifest"
    try:
        # The options are those of the first build, so Docker's cache avoids a second one.
        options = [f"REGISTRY={registry}/team", "TAG=7", "PUSH=1", "STAGES=build-manifest", *BUILD_OPTIONS]
        done = subprocess.run(
            ["make", "images", *options],
            cwd=CHECKOUT,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        line = next(
            line for line in image_list.read_text().splitlines() if line.startswith("build-manifest: ")
        )
    finally:
        image_list.write_text(before)
    pushed = line.removeprefix("build-manifest: ")
    assert re.fullmatch(rf"{name}@sha256:[0-9a-f]{{64}}", pushed)
    found, missing = check_images([pushed, f"{name}:7", f"{name}:8"])
    assert found.sign == "✓" and found.subject == "2 images"
    assert missing.sign == "✗" and "not found in the registry" in missing.detail
    subprocess.run(["docker", "rmi", "--force", f"{name}:7"], capture_output=True)
