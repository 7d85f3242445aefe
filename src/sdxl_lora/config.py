"""params.yaml as typed, frozen sections. Without defaults: DVC cannot track a value that is not in the file.

Each field's docstring gives its unit and effect; rules across fields are validators that name the keys, the
values and the remedy.
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
    """One section of params.yaml: immutable, unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class DownloadConfig(Section):
    repository: str
    """Hub data set (`owner/name`), or a folder with a leading `./` or `/`."""
    revision: str
    """Commit, tag or branch on the Hub; for a folder `sha256:...`, the digest of its content."""
    split: str
    """Split of a Hub data set; a folder has only `train`."""
    image_column: str
    """Column with the image (Hub) or its file name (folder)."""
    caption_column: str
    """Column with the caption, or a list of captions, of which training draws one at each visit."""
    max_examples: PositiveInt | None
    """Number of examples to use, from the first on; null: all."""


class CaptionsConfig(Section):
    trigger: str | None
    """Phrase that is put before every caption and later evokes the style in prompts; null: none."""
    artefacts: list[str]
    """Words invented by the captioning model, removed everywhere (whole words, any case)."""
    min_words: PositiveInt
    """Captions with fewer words after cleaning are rejected."""
    max_tokens: Annotated[int, Field(ge=3, le=77)]
    """CLIP tokens, start and end included, above which a caption is too long. SDXL's encoders read 77."""
    too_long: Literal["truncate", "reject"]
    """`reject`: too long captions are left out. `truncate`: they stay and are reported; the text encoders
    read their first 77 tokens."""


class ModelConfig(Section):
    base: str
    """SDXL in diffusers' layout: a Hub repository, or a folder with a leading `./` or `/`."""
    revision: str
    """Commit, tag or branch on the Hub; `sha256:...` for a folder."""
    variant: str | None
    """Variant in the names of the weight files (`fp16` for *.fp16.safetensors); null: none."""
    vae: str | None
    """VAE that replaces the base model's, named as `base`; null: the base model's VAE."""
    vae_revision: str | None
    """Revision of `vae`; null if and only if `vae` is null."""
    text_encoders: Literal["frozen", "trained", "trained_then_frozen"]
    """`trained`: adapters on both text encoders. `trained_then_frozen`: the same, but after
    training.text_encoder_steps each caption is embedded once and its embedding reused. `frozen`: no adapters;
    embeddings come from the encoded data set."""

    @model_validator(mode="after")
    def vae_comes_with_its_revision(self) -> Self:
        if (self.vae is None) != (self.vae_revision is None):
            raise ValueError(
                f"model.vae is {self.vae!r} but model.vae_revision is {self.vae_revision!r}: "
                "set both (a pinned VAE), or both to null (the base model's VAE)"
            )
        return self


class EncodingConfig(Section):
    resolution: Resolution
    """Side of the square to which images are resized and cropped, pixels, a multiple of 64."""
    aspect_ratios: AspectRatios
    """`square`: every image is cropped to the square. `buckets`: each image is cropped to the size of nearly
    the same area whose aspect ratio is nearest to the image's, and all images of a batch have one size."""
    crop: Literal["center", "random"]
    """Position of the crop in the resized image; `random` is drawn once per image, keyed by its content."""
    flip: bool
    """Encode each image mirrored as well; training draws one of the two at each visit. Captions are not
    changed, even if they say left or right."""
    vae_precision: Precision
    """Arithmetic of the VAE. The VAE of SDXL overflows in fp16; sdxl-vae-fp16-fix does not."""
    text_precision: Precision
    """Arithmetic of frozen text encoders, and storage of their embeddings."""
    vae_tile: Resolution | None
    """Side of the overlapping tiles in which the VAE encodes larger images to save memory, pixels. Latents
    then differ slightly, because each tile is normalized separately. null: whole images."""
    batch_size: PositiveInt
    """Images encoded at once. 1 at 1024 px takes 1.5 GiB in fp16; `make plan` shows what more take."""
    shard_size: PositiveInt
    """Examples per file of the encoded data set."""
    held_out: OpenFraction
    """Fraction of the examples held out from training for evaluation, selected by image content."""
    near_duplicate_bits: Annotated[int, Field(ge=0, le=192)] | None
    """Images whose perceptual hashes (192 bits) differ in at most this many bits are near duplicates. They
    are reported, and held-out near duplicates of training images are excluded. null: no search."""
    strict: bool
    """true: a bad image stops the stage; false: it is excluded and reported."""


class LoraConfig(Section):
    rank: PositiveInt
    """Rank r of each update B @ A."""
    alpha: PositiveFloat
    """The update is scaled by alpha / rank."""
    dropout: Fraction
    """Fraction of each adapter's inputs that training sets to zero."""
    unet_modules: ModuleNames
    """UNet layers that get an adapter, matched by the end of their path."""
    text_encoder_modules: ModuleNames
    """Layers of both text encoders that get an adapter; unused if model.text_encoders is `frozen`."""


class TrainingConfig(Section):
    steps: PositiveInt
    """Optimizer steps."""
    batch_size: PositiveInt
    """Examples per optimizer step."""
    micro_batch_size: Literal["auto"] | PositiveInt
    """Examples per forward and backward pass, a divisor of batch_size; `auto`: as many as vram_gib allows."""
    precision: Precision
    """Arithmetic and storage of the frozen weights; fp16 with loss scaling. Adapters are always fp32."""
    quantization: Quantization
    """Storage of the frozen linear layers: 8.25 (`int8`) or 4.25 (`nf4`) bits per weight. Their arithmetic
    stays that of `precision`.

    Only in training: sampling and evaluation use the base model without quantization.
    """
    optimizer: Literal["adamw_8bit", "adamw"]
    """`adamw_8bit` stores both moments in 8 bits (Dettmers et al. 2022, arXiv:2110.02861)."""
    learning_rate: NonNegativeFloat
    """Peak learning rate of the UNet's adapters."""
    text_encoder_learning_rate: NonNegativeFloat
    """Peak learning rate of the text encoders' adapters."""
    text_encoder_steps: PositiveInt | None
    """Optimizer steps after which `trained_then_frozen` text encoders are frozen; null otherwise."""
    schedule: Literal["cosine", "constant"]
    """Learning rate after the warm-up: a cosine that would reach 0 one step after the last, or constant."""
    warmup_steps: NonNegativeInt
    """Optimizer steps over which the learning rate rises linearly."""
    betas: tuple[OpenFraction, OpenFraction]
    """Decay rates of AdamW's first and second moments."""
    weight_decay: NonNegativeFloat
    """AdamW's decoupled weight decay (Loshchilov & Hutter 2019, arXiv:1711.05101)."""
    max_grad_norm: PositiveFloat
    """Gradients of all adapters together are scaled down to this Euclidean norm if theirs is larger."""
    min_snr_gamma: PositiveFloat | None
    """Cap of Min-SNR loss weighting (Hang et al. 2023, arXiv:2303.09556); null: no weighting."""
    caption_dropout: Fraction
    """Fraction of the examples trained without their caption, for classifier-free guidance."""
    checkpointing: Literal["auto", "none", "all"] | NonNegativeInt
    """Blocks with activation checkpointing: a number, of those that save the most memory for the least
    recomputation; `auto`: as few as vram_gib requires."""
    attention: Attention
    """Kernels of the UNet's self-attention: `auto` measures them and selects the fastest, `sdpa` leaves the
    selection to PyTorch. Cross-attention has a separate kernel on GPUs of compute capability 8.0 or newer,
    unless this is `math`."""
    deterministic: bool
    """Use only deterministic kernels: bit-identical results on the same GPU and software. Not slower on an
    H100."""
    ema_decay: OpenFraction | None
    """Decay per step of an exponential moving average of the adapters, which is saved instead of the last
    weights; null: the last weights."""
    vram_gib: PositiveFloat | None
    """Limit of training's GPU memory, GiB, enforced; requires a GPU. null: no limit, CPU allowed."""
    log_every: PositiveInt
    """Steps between two points of the curves."""
    preview_every: PositiveInt | None
    """Steps between two preview images of the first prompt; null: no previews."""
    checkpoint_minutes: NonNegativeFloat | None
    """Minutes between two checkpoints; 0: one per step; null: only when training is told to stop."""
    deadline_minutes: PositiveFloat | None
    """Minutes from the start of the stage, before whose end training stops with a checkpoint; null: no
    limit."""

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
        """Micro-batches per optimizer step; 1 as long as micro_batch_size is `auto`."""
        return 1 if self.micro_batch_size == "auto" else self.batch_size // self.micro_batch_size


class SamplingConfig(Section):
    prompts: Annotated[list[str], Field(min_length=1)]
    """Prompts to sample with the base model and with the adapter."""
    training_captions: NonNegativeInt
    """Number of training captions to sample as well; scored separately to detect memorization."""
    held_out_captions: NonNegativeInt
    """Number of held-out captions to sample as well; scored separately to measure generalization."""
    seeds: Annotated[list[NonNegativeInt], Field(min_length=1)]
    """Seeds of the initial noise: one image per prompt, seed and strength, with equal noise per seed."""
    strengths: Annotated[list[NonNegativeFloat], Field(min_length=1)]
    """Factors of the adapter's update, one per column of the grid: 0 is the base model, 1 the adapter."""
    negative_prompt: str | None
    """Prompt that guidance steers away from; null: the empty condition."""
    num_inference_steps: PositiveInt
    """Denoising steps per image."""
    guidance_scale: NonNegativeFloat
    """Scale of classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598); at most 1: no guidance."""
    resolution: Resolution
    """Side of the images, pixels."""
    precision: Precision
    """Arithmetic of the whole pipeline."""
    batch_size: PositiveInt
    """Images denoised at once. The VAE decodes them one at a time."""


class StyleConfig(Section):
    """Zero-shot style classification of the samples by CLIP, as in Radford et al. 2021, arXiv:2103.00020."""

    target: str
    """Phrase of the trained style in prompts."""
    others: Annotated[list[str], Field(min_length=1)]
    """Phrases of other styles, which replace the target phrase in the prompt."""


class GatesConfig(Section):
    """Requirements for promoting an adapter; null: not required. Changes are relative to the base model."""

    held_out_loss_change: float | None
    """Maximum of the upper confidence limit of the held-out loss's change, percent. 0: better than the base
    model at the given confidence."""
    style_distance_change: float | None
    """Maximum of the upper confidence limit of the style distance's change. 0: closer to real images at the
    given confidence."""
    style_probability: Fraction | None
    """Minimum of the adapter's style probability."""
    clip_score_change: float | None
    """Minimum of the CLIP score's change: how far samples may deviate from their prompts."""
    diversity_kept: Fraction | None
    """Minimum of the adapter's diversity as a fraction of the base model's."""
    copied: Fraction | None
    """Maximum fraction of the adapter's samples that count as copies of training images."""


class EvaluationConfig(Section):
    timesteps: Annotated[list[Timestep], Field(min_length=1)]
    """Timesteps at which the held-out denoising loss is measured, 0 (clean) to 999 (noise)."""
    noises: PositiveInt
    """Noise draws per held-out image and timestep."""
    seed: NonNegativeInt
    """Seed of these draws, separate from that of training so that runs with other seeds are comparable."""
    precision: Precision
    """Arithmetic of UNet and text encoders."""
    batch_size: PositiveInt
    """Examples per forward pass."""
    max_examples: PositiveInt | None
    """Number of held-out examples to evaluate, from the first on; null: all."""
    clip_model: str
    """CLIP that scores images against prompts: a Hub repository, or a folder with a leading `./` or `/`."""
    clip_revision: str
    """Commit, tag or branch of clip_model on the Hub; `sha256:...` for a folder."""
    style: StyleConfig | None
    """Styles that CLIP classifies; null: no style probability."""
    resamples: PositiveInt
    """Bootstrap samples per confidence interval."""
    confidence: OpenFraction
    """Confidence level: the fraction of the bootstrap samples inside an interval."""
    copy_quantile: OpenFraction
    """Fraction of the held-out images that must not count as copies; sets the threshold of that check."""
    gates: GatesConfig


class ExportConfig(Section):
    title: str
    """Name of the adapter. In lower case, with `-` for spaces, it names the file for ComfyUI."""
    license: str
    """License of the adapter, by the Hub's identifier."""


class Params(Section):
    """The whole of params.yaml."""

    seed: NonNegativeInt
    """Seed of all random numbers in training: initial adapters, order, noise, timesteps, caption dropout."""
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
    """Return all divisors of `number`, ascending."""
    return [candidate for candidate in range(1, number + 1) if number % candidate == 0]


def _explain(error: ValidationError, path: Path) -> str:
    """Return all errors of a params file, one per line: key, error, value, and the most similar known key."""
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
    return f"{path} does not fit the schema (src/sdxl_lora/config.py documents each key):\n" + "\n".join(
        lines
    )


def _known_keys(section: tuple[int | str, ...]) -> list[str]:
    """Return the keys of the section at this place in params.yaml."""
    model: type[BaseModel] = Params
    for part in section:
        annotation = model.model_fields[str(part)].annotation
        candidates = [kind for kind in (annotation, *get_args(annotation)) if isinstance(kind, type)]
        model = next(kind for kind in candidates if issubclass(kind, BaseModel))
    return list(model.model_fields)


def load_params(path: Path = PARAMS) -> Params:
    """Read and validate a params file.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it is not YAML, or a key is unknown, missing or out of range; names every such key.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} not found in {Path.cwd().name}/: run in the project's root, or `git checkout {path}`"
        )
    try:
        return Params.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    except ValidationError as error:
        raise ValueError(_explain(error, path)) from error
