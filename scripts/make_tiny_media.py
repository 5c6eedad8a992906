"""Makes four models that make noise of every kind: tiny, with random weights, in seconds.

    python scripts/make_tiny_media.py FOLDER

FOLDER then has `audio` (Bark), `image` (Stable Diffusion), `lora.safetensors` (for that), `video`
(text-to-video of Stable Diffusion's family) and `3d` (Shap-E). They go the whole way that real ones
go; what comes of them looks and sounds like nothing. Needs requirements-media.txt.
"""

import argparse
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    HeunDiscreteScheduler,
    PriorTransformer,
    ShapEPipeline,
    StableDiffusionPipeline,
    TextToVideoSDPipeline,
    UNet2DConditionModel,
    UNet3DConditionModel,
)
from diffusers.pipelines.shap_e import ShapERenderer
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    BarkConfig,
    BarkModel,
    BarkProcessor,
    BertTokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    GenerationConfig,
)
from transformers.models.bark.generation_configuration_bark import (
    BarkCoarseGenerationConfig,
    BarkFineGenerationConfig,
    BarkSemanticGenerationConfig,
)

WIDTH = 32  # of a text's embedding


def clip_tokenizer() -> CLIPTokenizer:
    """Spells a text byte by byte."""
    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocab = {word: number for number, word in enumerate(words)}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77)


def clip_config(tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=37, num_hidden_layers=2,
        num_attention_heads=4, projection_dim=WIDTH, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip


def autoencoder() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(4, 8), norm_num_groups=2, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip


def scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        steps_offset=1,
    )


def image_pipeline() -> StableDiffusionPipeline:
    """Of 64 pixels a side."""
    tokenizer = clip_tokenizer()
    unet = UNet2DConditionModel(
        sample_size=32, block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=2,
        cross_attention_dim=WIDTH, attention_head_dim=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    return StableDiffusionPipeline(
        vae=autoencoder(), text_encoder=CLIPTextModel(clip_config(tokenizer)), tokenizer=tokenizer,
        unet=unet, scheduler=scheduler(), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip


def lora_weights(unet: UNet2DConditionModel) -> dict[str, torch.Tensor]:
    """Of the attention, as large as to be seen in a picture."""
    unet.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v"]))
    weights = {
        name: torch.randn_like(weight) for name, weight in get_peft_model_state_dict(unet).items()
    }
    return {f"unet.{name}": weight for name, weight in weights.items()}


def video_pipeline() -> TextToVideoSDPipeline:
    """Of 64 pixels a side."""
    tokenizer = clip_tokenizer()
    unet = UNet3DConditionModel(
        sample_size=32, block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=2,
        cross_attention_dim=WIDTH, attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
    )  # fmt: skip
    return TextToVideoSDPipeline(
        vae=autoencoder(), text_encoder=CLIPTextModel(clip_config(tokenizer)), tokenizer=tokenizer,
        unet=unet, scheduler=scheduler(),
    )  # fmt: skip


def shape_pipeline() -> ShapEPipeline:
    tokenizer = clip_tokenizer()
    prior = PriorTransformer(
        num_attention_heads=2, attention_head_dim=16, embedding_dim=WIDTH, num_embeddings=32,
        embedding_proj_dim=WIDTH, time_embed_dim=64, num_layers=1, clip_embed_dim=2 * WIDTH,
        additional_embeddings=0, time_embed_act_fn="gelu", norm_in_type="layer",
        embedding_proj_norm_type="layer", encoder_hid_proj_type=None, added_emb_type=None,
    )  # fmt: skip
    renderer = ShapERenderer(
        param_shapes=((8, 93), (8, 8), (8, 8), (8, 8)), d_latent=WIDTH, d_hidden=8, n_output=12,
        background=(0.1, 0.1, 0.1),
    )  # fmt: skip
    fill_marching_cubes(renderer.mesh_decoder)
    return ShapEPipeline(
        prior=prior, text_encoder=CLIPTextModelWithProjection(clip_config(tokenizer)),
        tokenizer=tokenizer, shap_e_renderer=renderer,
        scheduler=HeunDiscreteScheduler(
            beta_schedule="exp", num_train_timesteps=1024, prediction_type="sample",
            use_karras_sigmas=True, clip_sample=True, clip_sample_range=1.0,
        ),
    )  # fmt: skip


def fill_marching_cubes(decoder: Any) -> None:
    """Sets the table that a real checkpoint brings: for each way in which the corners of a cube can
    be inside or outside, triangles between the middles of its edges. Here it is one polygon through
    all edges that are crossed, which is right for most of them."""
    for bits in range(256):
        crossed = [
            number
            for number, (start, end) in enumerate(cube_edges())
            if is_inside(bits, start) != is_inside(bits, end)
        ]
        if not crossed:
            continue
        middles = torch.tensor([cube_edges()[each] for each in crossed]).float().mean(1)
        middles -= middles.mean(0)
        across, along = torch.linalg.svd(middles)[2][:2]
        around = torch.atan2(middles @ along, middles @ across).argsort().tolist()
        first, *others = (crossed[each] for each in around)
        for number, (second, third) in enumerate(list(pairwise(others))[:5]):
            decoder.cases[bits, number] = torch.tensor([first, second, third])
            decoder.masks[bits, number] = True


def cube_edges() -> list[tuple[tuple[int, ...], ...]]:
    """The two corners of each edge, in the order that diffusers has: those along x, y, then z, and
    of the two other axes the first one changes first."""
    return [
        tuple((*rest[:axis], at, *rest[axis:]) for at in (0, 1))
        for axis in range(3)
        for rest in ((0, 0), (1, 0), (0, 1), (1, 1))
    ]


def is_inside(bits: int, corner: tuple[int, ...]) -> bool:
    return bool(bits >> sum(at << axis for axis, at in enumerate(corner)) & 1)


def bark_tokenizer() -> BertTokenizer:
    """Spells a text letter by letter."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = [chr(code) for code in range(33, 127) if not chr(code).isupper()]
    words = [*special, *letters, *(f"##{letter}" for letter in letters)]
    return BertTokenizer(vocab={word: number for number, word in enumerate(words)})


def bark() -> tuple[BarkModel, BarkProcessor]:
    """Of 24,000 samples a second, as the real one, whose numbers for tokens are ten times these."""
    part = {"num_layers": 1, "num_heads": 2, "hidden_size": 16, "block_size": 1024}
    codec = {"hidden_size": 16, "num_filters": 2, "codebook_size": 64, "num_lstm_layers": 1}
    config = BarkConfig(
        semantic_config=part | {"input_vocab_size": 12_960, "output_vocab_size": 12_960},
        coarse_acoustics_config=part | {"input_vocab_size": 1210, "output_vocab_size": 1210},
        fine_acoustics_config=part
        | {"input_vocab_size": 65, "output_vocab_size": 65, "n_codes_total": 8, "n_codes_given": 1},
        codec_config=codec | {"model_type": "encodec"},
    )
    model = BarkModel(config)
    for layer in model.codec_model.quantizer.layers:
        layer.codebook.embed.normal_()  # else zeros, and every sound the same
    semantic = BarkSemanticGenerationConfig(
        eos_token_id=1000, semantic_pad_token=1000, semantic_vocab_size=1000,
        text_encoding_offset=1005, text_pad_token=12_959, semantic_infer_token=12_958,
        max_input_semantic_length=256, do_sample=True,
    )  # fmt: skip
    coarse = BarkCoarseGenerationConfig(
        coarse_semantic_pad_token=1204, coarse_infer_token=1205, do_sample=True
    )
    model.generation_config = GenerationConfig(
        semantic_config=semantic.to_dict(), coarse_acoustics_config=coarse.to_dict(),
        fine_acoustics_config=BarkFineGenerationConfig().to_dict(), codebook_size=64,
        sample_rate=24_000,
    )  # fmt: skip
    return model, BarkProcessor(bark_tokenizer())


def make(folder: Path) -> None:
    """Makes all of them, the same each time."""
    torch.manual_seed(0)
    image = image_pipeline()
    image.save_pretrained(folder / "image")
    save_file(lora_weights(image.unet), folder / "lora.safetensors")
    video_pipeline().save_pretrained(folder / "video")
    shape_pipeline().save_pretrained(folder / "3d")
    model, processor = bark()
    model.save_pretrained(folder / "audio")
    processor.save_pretrained(folder / "audio")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    make(parser.parse_args().folder)
