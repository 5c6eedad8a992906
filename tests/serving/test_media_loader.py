"""What of the settings for sounds, pictures, videos and shapes stops the start."""

import pytest

from serving import media_loader
from serving.content_filter import ContentFilter
from serving.media_loader import begin_media
from serving.settings import Settings


def start_with(**settings: str) -> None:
    begin_media(Settings(**settings), ContentFilter(""))


def test_no_model_is_begun_where_none_is_set() -> None:
    assert begin_media(Settings(), ContentFilter("")) == {}


def test_model_without_the_requirements_stops_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(media_loader, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="VIDEO_MODEL: needs what requirements-media"):
        start_with(video_model="some/pipeline")


def test_lora_without_a_model_stops_the_start() -> None:
    with pytest.raises(SystemExit, match="IMAGE_LORA: needs an IMAGE_MODEL"):
        start_with(image_lora="some/weights")
