"""params.yaml as typed, frozen sections. No defaults: DVC cannot track a number that is not in the file.

Every field's docstring states its unit and effect; rules across fields are validators that name the keys,
the values and the remedy.
"""

from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Literal, Self, get_args

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from sdxl_lora.paths import PARAMS

Precision = Literal["fp16", "bf16", "fp32"]
PredictionType = Literal["epsilon", "v_prediction"]
Quantization = Literal["none", "int8", "nf4"]
AttentionBackend = Literal["sdpa", "flash", "cudnn", "efficient", "math", "triton", "xformers"]
Attention = Literal["auto", AttentionBackend]
AspectRatios = Literal["square", "buckets"]
Fraction = Annotated[float, Field(ge=0, le=1)]
OpenFraction = Annotated[float, Field(gt=0, lt=1)]
Timestep = Annotated[int, Field(ge=0, le=999)]
Resolution = Annotated[int, Field(ge=64, multiple_of=64)]
ModuleNames = Annotated[list[str], Field(min_length=1)]


class Section(BaseModel):
    """One section of params.yaml: immutable, with no keys but its own."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class DownloadConfig(Section):
    repository: str
    """Hub data set (`owner/name`), or a folder, written with a leading `./` or `/`."""
    revision: str
    """Commit, tag or branch on the Hub; `sha256:...`, the digest of its content, for a folder."""
    split: str
    """Split to take from a Hub data set; a folder has only `train`."""
    image_column: str
    """Column that holds the image (Hub) or its file name (folder)."""
    caption_column: str
    """Column that holds the caption, or a list of captions, one of which each visit of training draws."""
    max_examples: PositiveInt | None
    """Take the first so many examples; null: all."""


class CaptionsConfig(Section):
    trigger: str | None
    """Phrase put before every caption, to call the style by; null: none."""
    artefacts: list[str]
    """Words that a captioner made up, removed wherever they stand (whole words, any case)."""
    min_words: PositiveInt
    """Captions with fewer words after cleaning are rejected."""
    max_tokens: Annotated[int, Field(ge=3, le=77)]
    """CLIP tokens, start and end included. SDXL's encoders read 77 at most."""
    too_long: Literal["truncate", "reject"]
    """What happens to a caption of more than max_tokens."""


class ModelConfig(Section):
    base: str
    """SDXL in diffusers' layout: a Hub repository, or a folder, written with a leading `./` or `/`."""
    revision: str
    """Commit, tag or branch on the Hub; `sha256:...` for a folder."""
    variant: str | None
    """Infix of the weight files (`fp16` for *.fp16.safetensors); null: none."""
    vae: str | None
    """Replacement VAE, named as `base`; null: the base model's own."""
    vae_revision: str | None
    """Revision of the replacement VAE; null exactly if `vae` is null."""
    text_encoders: Literal["frozen", "trained", "trained_then_frozen"]
    """`trained` puts adapters on both text encoders, `trained_then_frozen` trains these for
    training.text_encoder_steps and then embeds each caption once; `frozen` reads embeddings from the encoded
    data set."""

    @model_validator(mode="after")
    def vae_comes_with_its_revision(self) -> Self:
        if (self.vae is None) != (self.vae_revision is None):
            raise ValueError(
                f"model.vae is {self.vae!r} but model.vae_revision is {self.vae_revision!r}: "
                "set both (a pinned VAE), or both to null (the base model's own)"
            )
        return self


class EncodingConfig(Section):
    resolution: Resolution
    """Side of the square that images are resized and cropped to, pixels, a multiple of 64."""
    aspect_ratios: AspectRatios
    """`buckets`: instead of to the square, each image is cropped to that size of nearly its area whose aspect
    ratio is nearest to the image's. A batch has images of one size."""
    crop: Literal["center", "random"]
    """Where that is cut from a resized image; `random` is drawn once per image, from its content."""
    flip: bool
    """Encode each image mirrored as well; each visit of training draws one of the two. Captions stay as they
    are, also where they say left or right."""
    vae_precision: Precision
    """Arithmetic of the VAE. SDXL's own VAE overflows in fp16; sdxl-vae-fp16-fix does not."""
    text_precision: Precision
    """Arithmetic of frozen text encoders, and the precision in which their embeddings are stored."""
    vae_tile: Resolution | None
    """Side of the overlapping tiles that the VAE encodes larger images in, pixels, to save memory. Latents
    then differ a little, as each tile is normalised alone. null: images as a whole."""
    batch_size: PositiveInt
    """Images encoded at once. 1 at 1024 px takes 1.5 GiB in fp16; `make plan` says what more take."""
    shard_size: PositiveInt
    """Examples in one file of the encoded data set."""
    held_out: OpenFraction
    """Share of the examples kept out of training for evaluation, chosen by image content."""
    near_duplicate_bits: Annotated[int, Field(ge=0, le=192)] | None
    """Images whose perceptual hashes (192 bits) differ in no more bits are near duplicates. They are
    reported; a held-out one of a training image is left out. null: not looked for."""
    strict: bool
    """true: a bad image stops the stage; false: it is left out and reported."""


class LoraConfig(Section):
    rank: PositiveInt
    """Rank r of each update B @ A."""
    alpha: PositiveFloat
    """The update is scaled by alpha / rank."""
    dropout: Fraction
    """Share of each adapter's inputs zeroed in training."""
    unet_modules: ModuleNames
    """Names of the UNet's layers that get an adapter, matched at the end of their path."""
    text_encoder_modules: ModuleNames
    """The same for both text encoders; used unless model.text_encoders is `frozen`."""


class TrainingConfig(Section):
    steps: PositiveInt
    """Optimizer steps."""
    batch_size: PositiveInt
    """Examples of one optimizer step."""
    micro_batch_size: Literal["auto"] | PositiveInt
    """Examples of one forward and backward pass, a divisor of batch_size; `auto`: what vram_gib allows."""
    precision: Precision
    """Arithmetic and storage of the frozen weights; fp16 with loss scaling. Adapters are always fp32."""
    quantization: Quantization
    """Storage of the frozen linear layers, 8.25 (`int8`) or 4.25 (`nf4`) bits a weight; the arithmetic stays.

    For training alone: samples and evaluation have the adapter on the base model as it is.
    """
    optimizer: Literal["adamw_8bit", "adamw"]
    """`adamw_8bit` keeps both moments in 8 bits (Dettmers et al. 2022, arXiv:2110.02861)."""
    learning_rate: NonNegativeFloat
    """Peak learning rate of the UNet's adapters."""
    text_encoder_learning_rate: NonNegativeFloat
    """Peak learning rate of the text encoders' adapters."""
    text_encoder_steps: PositiveInt | None
    """Optimizer steps after which `trained_then_frozen` text encoders are frozen; null for all others."""
    schedule: Literal["cosine", "constant"]
    """Learning rate after the warm-up: down to 0 at the last step along a cosine, or constant."""
    warmup_steps: NonNegativeInt
    """Optimizer steps over which the learning rate rises linearly."""
    betas: tuple[OpenFraction, OpenFraction]
    """Decay of AdamW's first and second moment."""
    weight_decay: NonNegativeFloat
    """AdamW's decoupled weight decay (Loshchilov & Hutter 2019, arXiv:1711.05101)."""
    max_grad_norm: PositiveFloat
    """Gradients are scaled down to this Euclidean norm, over all adapters together."""
    min_snr_gamma: PositiveFloat | None
    """Cap of Min-SNR loss weighting (Hang et al. 2023, arXiv:2303.09556); null: no weighting."""
    caption_dropout: Fraction
    """Share of the examples trained without their caption, for classifier-free guidance."""
    checkpointing: Literal["auto", "none", "all"] | NonNegativeInt
    """Blocks whose activations the backward pass computes again: a number of them, those first that free the
    most memory for the arithmetic; `auto`: as few as vram_gib demands."""
    attention: Attention
    """Kernels of the UNet's self-attention: `auto` measures and takes the fastest, `sdpa` is PyTorch's
    choice. Attention to captions has a kernel of its own on a GPU, unless this is `math`."""
    deterministic: bool
    """Use only kernels that repeat to the bit on the same GPU and software: no slower on an H100."""
    ema_decay: OpenFraction | None
    """Save an exponential moving average of the adapters with this decay a step; null: the last weights."""
    vram_gib: PositiveFloat | None
    """GPU memory that training may take, GiB, enforced: it then needs a GPU. null: no limit, CPU allowed."""
    log_every: PositiveInt
    """Steps between two points of the curves."""
    preview_every: PositiveInt | None
    """Steps between two preview images of the first prompt; null: none."""
    checkpoint_minutes: NonNegativeFloat | None
    """Wall time between two checkpoints; 0: one a step; null: none but when training is told to stop."""
    deadline_minutes: PositiveFloat | None
    """Wall time from the stage's start before whose end training stops with a checkpoint; null: no end."""

    @model_validator(mode="after")
    def warmup_ends_before_training_does(self) -> Self:
        if self.warmup_steps >= self.steps:
            raise ValueError(
                f"training.warmup_steps ({self.warmup_steps}) must be below training.steps ({self.steps}): "
                "lower the first or raise the second"
            )
        return self

    @model_validator(mode="after")
    def micro_batches_fill_a_batch(self) -> Self:
        if self.micro_batch_size != "auto" and self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"training.micro_batch_size ({self.micro_batch_size}) must divide training.batch_size "
                f"({self.batch_size}): set it to one of {divisors(self.batch_size)}, or to auto"
            )
        return self

    @model_validator(mode="after")
    def text_encoders_freeze_before_training_ends(self) -> Self:
        if self.text_encoder_steps is not None and self.text_encoder_steps >= self.steps:
            raise ValueError(
                f"training.text_encoder_steps ({self.text_encoder_steps}) must be below training.steps "
                f"({self.steps}): lower the first, or set it to null and model.text_encoders to trained"
            )
        return self

    @property
    def accumulation(self) -> int:
        """Passes whose gradients are averaged into one optimizer step; 1 while it is left to the planner."""
        return 1 if self.micro_batch_size == "auto" else self.batch_size // self.micro_batch_size


class SamplingConfig(Section):
    prompts: Annotated[list[str], Field(min_length=1)]
    """Prompts that base model and adapter both draw."""
    training_captions: NonNegativeInt
    """So many captions of training images are drawn as well, and scored apart: does it know them by heart?"""
    held_out_captions: NonNegativeInt
    """So many captions of held-out images, likewise: how does it draw what it was not shown?"""
    seeds: Annotated[list[NonNegativeInt], Field(min_length=1)]
    """Each prompt is drawn once per seed, from the same noise at every strength."""
    strengths: Annotated[list[NonNegativeFloat], Field(min_length=1)]
    """Factors of the adapter's update, one column of the grid each: 0 is the base model, 1 the adapter."""
    negative_prompt: str | None
    """What guidance steers away from; null: the empty condition."""
    num_inference_steps: PositiveInt
    """Denoising steps an image."""
    guidance_scale: NonNegativeFloat
    """Classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598); 1 or less: none."""
    resolution: Resolution
    """Side of the images, pixels."""
    precision: Precision
    """Arithmetic of the whole pipeline."""
    batch_size: PositiveInt
    """Images denoised at once; decoded one at a time."""


class StyleConfig(Section):
    """Zero-shot style classification of the samples by CLIP, as in Radford et al. 2021, arXiv:2103.00020."""

    target: str
    """Phrase that stands for the trained style in prompts."""
    others: Annotated[list[str], Field(min_length=1)]
    """Phrases put in its place for the styles that it competes with."""


class GatesConfig(Section):
    """What an adapter must reach to be promoted; null: not asked."""

    held_out_loss_change: float | None
    """Percent. The upper end of the held-out loss's change must not be above it; below 0: surely better."""
    style_distance_change: float | None
    """The upper end of the style distance's change must not be above it; 0: surely nearer to real images."""
    style_probability: Fraction | None
    """The adapter's style probability must not be below it."""
    clip_score_change: float | None
    """The CLIP score's change must not be below it: how far the samples may stray from their prompts."""
    diversity_kept: Fraction | None
    """The adapter's diversity as a share of the base model's must not be below it."""
    copied: Fraction | None
    """Share of the adapter's samples that may be taken for copies of training images."""


class EvaluationConfig(Section):
    timesteps: Annotated[list[Timestep], Field(min_length=1)]
    """Noise levels at which the held-out denoising loss is measured, 0 (clean) to 999 (noise)."""
    noises: PositiveInt
    """Noise draws per held-out image and timestep."""
    seed: NonNegativeInt
    """Key of those draws, apart from training's seed so that runs can be compared."""
    precision: Precision
    """Arithmetic of UNet and text encoders."""
    batch_size: PositiveInt
    """Examples of one forward pass."""
    max_examples: PositiveInt | None
    """Evaluate the first so many held-out examples; null: all."""
    clip_model: str
    """CLIP that scores images against prompts: a Hub repository, or a folder with a leading `./` or `/`."""
    clip_revision: str
    """Its commit, tag or branch on the Hub; `sha256:...` for a folder."""
    style: StyleConfig | None
    """Styles that CLIP tells apart; null: no style probability."""
    resamples: PositiveInt
    """Bootstrap samples behind each interval."""
    confidence: OpenFraction
    """Share of the bootstrap samples that an interval holds."""
    copy_quantile: OpenFraction
    """Share of the held-out images that the copying check must not take for copies: sets its threshold."""
    gates: GatesConfig


class ExportConfig(Section):
    title: str
    """What the adapter is called; in small letters, with `-` for spaces, the name of ComfyUI's file."""
    license: str
    """Licence of the adapter, as the Hub abbreviates it."""


class Params(Section):
    """The whole of params.yaml."""

    seed: NonNegativeInt
    """Key of every random draw of training: adapters' start, order, noise, timesteps, caption dropout."""
    download: DownloadConfig
    captions: CaptionsConfig
    model: ModelConfig
    encoding: EncodingConfig
    lora: LoraConfig
    training: TrainingConfig
    sampling: SamplingConfig
    evaluation: EvaluationConfig
    export: ExportConfig

    @model_validator(mode="after")
    def freezing_comes_with_its_step(self) -> Self:
        kind, steps = self.model.text_encoders, self.training.text_encoder_steps
        if (kind == "trained_then_frozen") != (steps is not None):
            remedy = (
                "set the second to the steps after which they are frozen"
                if steps is None
                else "set the first to trained_then_frozen, or the second to null"
            )
            raise ValueError(
                f"model.text_encoders is {kind!r} but training.text_encoder_steps is {steps!r}: {remedy}"
            )
        return self


def divisors(number: int) -> list[int]:
    """All that divide `number`, ascending."""
    return [candidate for candidate in range(1, number + 1) if number % candidate == 0]


def _explain(error: ValidationError, path: Path) -> str:
    """All faults of a params file, a line each: key, what is wrong, the value, and the nearest known key."""
    lines = []
    for fault in error.errors():
        key = ".".join(str(part) for part in fault["loc"])
        line = f"  {key}: {fault['msg']}" if key else f"  {fault['msg']}"
        if fault["type"] == "extra_forbidden":
            near = get_close_matches(str(fault["loc"][-1]), _known_keys(fault["loc"][:-1]), n=1)
            line = f"  {key}: unknown key" + (f"; did you mean `{near[0]}`?" if near else "")
        elif fault["type"] != "missing" and not isinstance(fault["input"], dict):
            line += f" (it is {fault['input']!r})"
        lines.append(line)
    return (
        f"{path} does not fit the schema (src/sdxl_lora/config.py says what each key means):\n"
        + "\n".join(lines)
    )


def _known_keys(section: tuple[int | str, ...]) -> list[str]:
    """The keys of the section at this place in params.yaml."""
    model: type[BaseModel] = Params
    for part in section:
        annotation = model.model_fields[str(part)].annotation
        candidates = [kind for kind in (annotation, *get_args(annotation)) if isinstance(kind, type)]
        model = next(kind for kind in candidates if issubclass(kind, BaseModel))
    return list(model.model_fields)


def load_params(path: Path = PARAMS) -> Params:
    """Reads and validates a params file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not YAML, or a key is unknown, missing or out of range; names every such key.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} not found in {Path.cwd().name}/: run from the project's root, or `git checkout {path}`"
        )
    try:
        return Params.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    except ValidationError as error:
        raise ValueError(_explain(error, path)) from error
