"""Sounds, pictures, videos and shapes by the real libraries, on tiny pipelines with random weights.

One server makes them all, behind a key. Whether a picture looks like its prompt is not seen here.
"""

import base64
import io
import json
import os
import signal
import threading
import time
import wave
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import pytest

from tests.support import Served, events, metric, stream, wait_until

pytestmark = [pytest.mark.media, pytest.mark.filterwarnings("ignore")]

FIELDS: dict[str, dict[str, Any]] = {
    "audio": {"seconds": 0.3},
    "image": {"steps": 3},
    "video": {"steps": 2, "num_frames": 4, "size": "64x80"},
    "3d": {"steps": 2, "grid_size": 16},
}
LONG = {"prompt": "a fox", "steps": 150, "size": "160x160"}  # some five seconds


def process_of(service: Served) -> int:
    """Of the model that is at work: the one that has used most of its time just now."""

    def ticks(pid: str) -> int:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11])

    children = Path(f"/proc/{service.process.pid}/task/{service.process.pid}/children")
    before = {pid: ticks(pid) for pid in children.read_text().split()}
    time.sleep(0.5)
    return int(max(before, key=lambda pid: ticks(pid) - before[pid]))


def make(http: httpx.Client, kind: str, seed: int = 7, **fields: Any) -> httpx.Response:
    asked = {"prompt": "a fox", "seed": seed, **FIELDS[kind], **fields}
    answer = http.get(f"/generate/{kind}", params=asked)
    assert answer.status_code == 200, answer.text
    return answer


@pytest.mark.parametrize(
    ("kind", "media_type", "begins_with"),
    [
        ("audio", "audio/wav", b"RIFF"),
        ("image", "image/png", b"\x89PNG"),
        ("video", "video/mp4", b"\0\0\0"),
        ("3d", "model/gltf-binary", b"glTF"),
    ],
)
def test_seed_gives_the_same_again(
    http: httpx.Client, kind: str, media_type: str, begins_with: bytes
) -> None:
    first, again, other = (make(http, kind, seed=seed) for seed in (7, 7, 8))
    assert (first.headers["content-type"], first.headers["x-seed"]) == (media_type, "7")
    assert first.content.startswith(begins_with)
    assert first.content == again.content != other.content


def test_picture_has_the_size_that_was_asked_for(http: httpx.Client) -> None:
    from PIL import Image

    picture = Image.open(io.BytesIO(make(http, "image", size="72x64").content))
    assert (picture.format, picture.size) == ("PNG", (72, 64))


def test_video_has_the_frames_that_were_asked_for(http: httpx.Client) -> None:
    import av

    with av.open(io.BytesIO(make(http, "video", frames_per_second=5).content)) as video:
        (stream,) = video.streams
        frames = [frame.to_ndarray().shape for frame in video.decode(stream)]
        assert (stream.codec.canonical_name, stream.average_rate, len(frames)) == ("h264", 5, 4)
        assert (stream.width, stream.height) == (64, 80)


def test_sound_is_no_longer_than_asked_for(http: httpx.Client) -> None:
    with wave.open(io.BytesIO(make(http, "audio").content)) as sound:
        assert (sound.getframerate(), sound.getnchannels(), sound.getsampwidth()) == (24_000, 1, 2)
        assert 0 < sound.getnframes() <= 0.3 * 24_000


def test_shape_comes_as_accept_says(http: httpx.Client) -> None:
    asked = {"prompt": "a fox", "seed": 7, **FIELDS["3d"]}
    for accept, media_type in (
        ("*/*", "model/gltf-binary"),
        ("model/gltf-binary;q=0.5, model/ply", "application/x-ply"),
    ):
        answer = http.post("/generate/3d", json=asked, headers={"Accept": accept})
        assert (answer.status_code, answer.headers["content-type"]) == (200, media_type)
    refused = http.post("/generate/3d", json=asked, headers={"Accept": "image/png"})
    assert (refused.status_code, "model/gltf-binary" in refused.json()["detail"]) == (406, True)


def test_events_tell_of_steps_with_previews_and_end_with_the_result(http: httpx.Client) -> None:
    body = {"prompt": "a fox", "seed": 7, **FIELDS["image"], "stream": True}
    answer = http.post("/generate/image", json=body)
    *steps, (_, result) = events(answer.text)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert [(told["step"], told["of"]) for _, told in (steps[0], steps[-1])] == [(1, 3), (3, 3)]
    assert base64.b64decode(steps[0][1]["preview"]).startswith(b"\xff\xd8")
    assert base64.b64decode(result.pop("content")) == make(http, "image").content
    assert result == {"media_type": "image/png", "seed": 7, "model_name": "image"}


@pytest.mark.parametrize(
    ("kind", "fields", "loc", "msg"),
    [
        ("image", {"steps": 151}, ["body", "steps"], "Input should be less than or equal to 150"),
        ("image", {"size": "65x64"}, ["body", "size"], "this model takes multiples of 2"),
        ("image", {"seconds": 3}, ["body", "seconds"], "Extra inputs are not permitted"),
        ("3d", {"size": "64x64"}, ["body", "size"], "Extra inputs are not permitted"),
        (
            "audio",
            {"prompt": "," * 300, "seconds": 1},
            ["body"],
            "The text is longer than the 256 tokens that the model reads",
        ),
    ],
)
def test_field_that_cannot_be_had_is_refused(
    http: httpx.Client, kind: str, fields: dict[str, Any], loc: list[str], msg: str
) -> None:
    answer = http.post(f"/generate/{kind}", json={"prompt": "a", **fields})
    (problem,) = answer.json()["detail"]
    assert (answer.status_code, problem["loc"], problem["msg"]) == (422, loc, msg)


def test_forbidden_prompt_and_missing_key_are_refused_as_for_text(
    service: Served, http: httpx.Client
) -> None:
    with service.client() as stranger:
        assert stranger.get("/generate/image", params={"prompt": "a"}).status_code == 401
    refused = http.get("/generate/image", params={"prompt": "I hate it"})
    told = {"detail": "Prompt contains inappropriate content"}
    assert (refused.status_code, refused.json()) == (400, told)


@pytest.fixture
def client(service: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{service.address}/v1", api_key="secret", max_retries=0)


def test_openai_client_gets_pictures(client: openai.OpenAI, http: httpx.Client) -> None:
    made = client.images.generate(
        prompt="a fox", model="image", n=2, size="auto", extra_body={"seed": 7, "steps": 3}
    )
    pictures = [base64.b64decode(each.b64_json or "") for each in made.data or []]
    assert pictures == [make(http, "image", seed=seed).content for seed in (7, 8)]


def test_openai_client_gets_speech(client: openai.OpenAI, http: httpx.Client) -> None:
    def speak(form: Any) -> bytes:
        made = client.audio.speech.create(
            model="audio", voice="alloy", input="a fox", response_format=form,
            extra_body={"seed": 7, "seconds": 0.3},
        )  # fmt: skip
        return made.content

    assert speak("wav") == make(http, "audio").content
    begins = {"mp3": b"ID3", "opus": b"OggS", "flac": b"fLaC", "aac": b"\xff\xf1", "pcm": b""}
    assert all(speak(form).startswith(begins[form]) for form in begins)


def test_openai_errors_name_the_field(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.audio.speech.create(model="audio", voice="nova", input="a fox")
    assert refused.value.param == "voice"
    with pytest.raises(openai.NotFoundError) as unknown:
        client.images.generate(prompt="a fox", model="dall-e-3")
    assert unknown.value.code == "model_not_found"


def test_process_killed_in_the_middle_of_a_job_ends_that_alone(
    service: Served, http: httpx.Client
) -> None:
    answers: list[httpx.Response] = []
    asking = threading.Thread(
        target=lambda: answers.append(http.post("/generate/image", json=LONG))
    )
    asking.start()
    wait_until(lambda: metric(http.get("/metrics").text, "media_jobs_running") == 1)
    os.kill(process_of(service), signal.SIGKILL)
    asking.join()
    told = {"detail": "The model's process died while it made this; it starts again"}
    assert (answers[0].status_code, answers[0].json()) == (500, told)
    text = http.post("/generate", json={"prompt": "Once", "max_new_tokens": 2})
    assert text.status_code == 200
    assert make(http, "image").content.startswith(b"\x89PNG")


def test_client_that_leaves_stops_its_job(service: Served, http: httpx.Client) -> None:
    def ended(outcome: str) -> float:
        lines = http.get("/metrics").text.splitlines()
        return sum(
            float(line.rpartition(" ")[2])
            for line in lines
            if line.startswith("media_jobs_total") and f'outcome="{outcome}"' in line
        )

    before = ended("cancelled")
    with stream(service.address, LONG | {"stream": True}, "/generate/image") as answer:
        assert answer.status_code == 401
    with http.stream("POST", "/generate/image", json=LONG | {"stream": True}) as answer:
        next(answer.iter_text())
    wait_until(lambda: ended("cancelled") == before + 1)


def test_log_and_usage_log_tell_of_a_job(service: Served, tiny: Path, http: httpx.Client) -> None:
    id_ = make(http, "video").headers["x-request-id"]
    wait_until(lambda: id_ in (tiny / "usage.csv").read_text())
    wait_until(lambda: any(id_ in line for line in service.lines))
    (line,) = (line for line in service.log() if line["request_id"] == id_)
    assert (line["route"], line["status"], line["model"]) == ("/generate/video", 200, "video")
    assert line["key"] == "key-1"
    (row,) = (row for row in (tiny / "usage.csv").read_text().splitlines() if id_ in row)
    assert row.split(",")[2:4] == ["/generate/video", "video"]
    assert "fox" not in "".join(service.lines)


def test_document_has_the_routes_and_their_media_types(http: httpx.Client) -> None:
    document = http.get("/openapi.json").json()
    made = document["paths"]["/generate/3d"]["post"]["responses"]["200"]
    types = {"model/gltf-binary", "application/x-ply", "text/event-stream"}
    assert set(made["content"]) == types
    assert {"post"} == set(document["paths"]["/v1/images/generations"])
    assert json.dumps(document).count("ImageRequest") >= 2


def test_lora_changes_the_picture(tiny: Path) -> None:
    from media.image import ImageMaker

    def draw(lora: str | None) -> bytes:
        maker = ImageMaker(str(tiny / "image"), lora)
        asked = {"prompt": "a fox", "seed": 7, "steps": 2}
        return maker.make(asked, lambda step, of, preview=None: None).content

    plain, changed = draw(None), draw(str(tiny / "lora.safetensors"))
    assert plain != changed == draw(str(tiny / "lora.safetensors"))


def test_lora_that_cannot_be_had_is_what_the_reason_names(tiny: Path) -> None:
    from media.image import ImageMaker

    with pytest.raises(ValueError, match=r"IMAGE_LORA: there is to be one \.safetensors file"):
        ImageMaker(str(tiny / "image"), str(tiny / "image"))


def test_pipeline_for_pictures_makes_no_videos(tiny: Path) -> None:
    """It was served, and each request came to nothing."""
    from media.video import VideoMaker

    with pytest.raises(ValueError, match="StableDiffusionPipeline makes no videos"):
        VideoMaker(str(tiny / "image"))


def test_picture_that_the_models_own_checker_withholds_is_refused(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pipeline gives a black one instead, and only says so beside it."""
    from media.image import ImageMaker
    from media.messages import RefusedFields

    maker = ImageMaker(str(tiny / "image"))
    withheld = SimpleNamespace(images=[], nsfw_content_detected=[True])
    monkeypatch.setattr(maker, "run", lambda fields, on_step: withheld)
    with pytest.raises(RefusedFields, match="safety checker withheld"):
        maker.make({}, lambda step, of, preview=None: None)


def test_sigterm_lets_a_job_end(service: Served, http: httpx.Client) -> None:
    """The last one here: the server has gone after it."""
    answers: list[httpx.Response] = []
    body = LONG | {"steps": 50, "size": "64x64"}
    asking = threading.Thread(
        target=lambda: answers.append(http.post("/generate/image", json=body))
    )
    asking.start()
    wait_until(lambda: metric(http.get("/metrics").text, "media_jobs_running") == 1)
    service.process.send_signal(signal.SIGTERM)
    asking.join()
    assert answers[0].status_code == 200
    assert service.process.wait(60) == 0
