"""Small versions of the networks of SDXL (Podell et al. 2023) and CLIP (Radford et al. 2021).

As in SDXL: the layout of blocks (no attention at the highest resolution), linear projections into the
transformers, the concatenated penultimate layers of both text encoders, the second one's pooled projection
and the size conditioning through `text_time`, zeros for the empty prompt, epsilon prediction on SDXL's noise
schedule. Smaller: 128 pixels (16 x 16 latents), channels, depth, vocabulary.
"""

from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

IMAGE_SIZE = 128
LATENT_SIZE = IMAGE_SIZE // 8
TEXT_WIDTH = 128
SIZE_EMBEDDING = 32  # of each of the six time_ids
NORM_GROUPS = 16


def make_vae() -> AutoencoderKL:
    """Make the VAE, 2.0 M parameters; images in [-1, 1], (B, 3, 128, 128) <-> latents (B, 4, 16, 16)."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        sample_size=IMAGE_SIZE,
        norm_num_groups=NORM_GROUPS,
        layers_per_block=1,
        block_out_channels=(32, 64, 64, 96),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        force_upcast=False,  # SDXL's VAE overflows in fp16; this one does not
    )


def make_unet() -> UNet2DConditionModel:
    """Make the UNet, 7.6 M parameters; SDXL's has 2,567 M."""
    channels = (64, 96, 112)
    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=4,
        out_channels=4,
        norm_num_groups=NORM_GROUPS,
        layers_per_block=2,
        block_out_channels=channels,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=[1, 1, 1],
        attention_head_dim=[width // 16 for width in channels],  # in diffusers, this is the number of heads
        cross_attention_dim=2 * TEXT_WIDTH,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=SIZE_EMBEDDING,
        projection_class_embeddings_input_dim=6 * SIZE_EMBEDDING + TEXT_WIDTH,
    )


def make_text_encoders(tokenizer: CLIPTokenizer) -> tuple[CLIPTextModel, CLIPTextModelWithProjection]:
    """Make the text encoders, 0.7 M and 0.9 M parameters; SDXL's are CLIP ViT-L and OpenCLIP bigG."""

    def config(num_layers: int, activation: str) -> CLIPTextConfig:
        return CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=num_layers,
            num_attention_heads=4,
            hidden_act=activation,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )

    return CLIPTextModel(config(2, "quick_gelu")), CLIPTextModelWithProjection(config(3, "gelu"))


def make_evaluator(tokenizer: CLIPTokenizer) -> CLIPModel:
    """Make the evaluator, 2.3 M parameters; images in [-1, 1], (B, 3, 128, 128)."""
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": tokenizer.model_max_length,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {
        "image_size": IMAGE_SIZE,
        "patch_size": 16,
        "hidden_size": 160,
        "intermediate_size": 640,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
    }
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=128))


def make_scheduler() -> EulerDiscreteScheduler:
    """Make a scheduler with the values of SDXL's."""
    return EulerDiscreteScheduler(
        num_train_timesteps=1000,
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type="epsilon",
        timestep_spacing="leading",
        steps_offset=1,
    )
