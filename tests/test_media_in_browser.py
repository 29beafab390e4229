"""Recordings of a browser's MediaRecorder are decoded. It records a tone here instead of a microphone."""

import base64
import json

import numpy as np
import pytest

from slam_asr.audio import SAMPLE_RATE, AudioError, read_clip
from tests.scoring.test_report_in_browser import BROWSER, open_page

SECONDS = 2.0
PAGE = """<!doctype html><script>
const kinds = ["audio/webm;codecs=opus", "audio/webm;codecs=pcm", "audio/mp4;codecs=opus",
  "audio/mp4;codecs=mp4a.40.2", "video/webm;codecs=vp8,opus", "video/mp4;codecs=avc1.42001e,opus"];
function addPicture(stream) {
  const canvas = document.createElement("canvas"), pen = canvas.getContext("2d");
  setInterval(() => {
    pen.fillStyle = "#" + Math.random().toString(16).slice(2, 8);
    pen.fillRect(0, 0, 99, 99);
  }, 40);
  stream.addTrack(canvas.captureStream(25).getVideoTracks()[0]);
}
async function record(mimeType) {
  const context = new AudioContext({ sampleRate: 48000 });
  const tone = new OscillatorNode(context, { frequency: 440 });
  const { stream } = tone.connect(new GainNode(context, { gain: 0.3 }))
    .connect(context.createMediaStreamDestination());
  if (mimeType.startsWith("video")) addPicture(stream);
  const recorder = new MediaRecorder(stream, { mimeType }), parts = [];
  recorder.ondataavailable = (e) => parts.push(e.data);
  const stopped = new Promise((done) => recorder.onstop = done);
  tone.start();
  recorder.start(300);
  setTimeout(() => recorder.stop(), SECONDS * 1000);
  await stopped;
  await context.close();
  const reader = new FileReader();
  reader.readAsDataURL(new Blob(parts));
  await new Promise((done) => reader.onload = done);
  return reader.result.split("base64,")[1];
}
addEventListener("load", async () => {
  const recordings = {};
  for (const kind of kinds.filter((k) => MediaRecorder.isTypeSupported(k)))
    recordings[kind] = await record(kind);
  fetch("/results", { method: "POST", body: JSON.stringify(recordings) });
});
</script>""".replace("SECONDS", str(SECONDS))


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="this machine has no Chromium")
def test_recordings_of_a_browser_are_decoded_and_refused_if_they_are_cut(tmp_path):
    answer, _ = open_page(PAGE, tmp_path, 800, "--autoplay-policy=no-user-gesture-required")
    recordings = {kind: base64.b64decode(text) for kind, text in json.loads(answer).items()}
    assert "audio/webm;codecs=opus" in recordings, "what every browser but Safari writes by default"
    for kind, content in recordings.items():
        clip = read_clip(kind, content=content)
        # On a busy machine, a recorder begins and ends later than it was asked to.
        assert clip.duration == pytest.approx(SECONDS, abs=1.0), kind
        # Half a second, so the spectrum has one value per 2 Hz.
        middle = clip.samples[SAMPLE_RATE // 2 : SAMPLE_RATE]
        spectrum = np.abs(np.fft.rfft(middle * np.hanning(len(middle))))
        assert np.argmax(spectrum) == 440 // 2, kind
        assert np.abs(middle).max() == pytest.approx(0.3, abs=0.05), kind
        with pytest.raises(AudioError, match="ends too early"):
            read_clip(kind, content=content[: len(content) // 2])
