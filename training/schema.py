"""Every key that a run's YAML may have, its type and its default. Names follow Composer and llm-foundry.

A run is a list of stages. :class:`StageConfig` holds what a stage may set; written at the top level, the same
keys are defaults for all stages, and a run without ``stages`` is one stage. :class:`RunConfig` adds what
belongs to the whole run.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

Spec = dict[str, Any]
"""``name:`` of a registered thing, and its keyword arguments beside it."""


@dataclass
class DatasetConfig:
    """Where samples come from (``data.streaming.StreamingVLMDataset``)."""

    remote: str | None = None
    local: str | None = None
    split: str | None = None
    streams: dict[str, Spec] | None = None
    shuffle: bool = True
    shuffle_seed: int | None = None
    shuffle_algo: str = "py1e"
    shuffle_block_size: int | None = None
    num_canonical_nodes: int | None = None
    predownload: int | None = None
    cache_limit: str | None = None
    download_retry: int = 2
    download_timeout: float = 60.0
    validate_hash: str | None = "auto"
    epoch_size: str | None = None
    mixture: Spec | None = None
    patch_targets: str | None = None


@dataclass
class LoaderConfig:
    """Samples -> device batches.

    ``drop_last``: leave out what makes no whole global batch at an epoch's end; else its last batch is filled with
    blank rows, and every sample is used once an epoch.
    """

    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    num_workers: int = 2
    prefetch_factor: int = 4
    persistent_workers: bool = True
    pin_memory: bool = False
    timeout: float = 300.0
    drop_last: bool = False
    packing: bool = False
    turns: str = "meta"
    padding_side: str = "right"
    pad_to_multiple_of: int = 8


@dataclass
class EvalLoaderConfig(LoaderConfig):
    """An evaluation loader; its metrics are logged as ``metrics/<label>/...``."""

    label: str = "eval"
    batch_size: int = 32
    limit: int | None = None


@dataclass
class InitFrom:
    """Weights to start from, and nothing else of that run.

    ``path``: a stage of this run, a run, ``run@stage``, a Hugging Face folder, or a Composer checkpoint
    (``….pt``, or the folder of a sharded one). ``heads``: ``keep`` those of methods that are on, ``drop``, ``new``.
    """

    path: str = ""
    heads: str = "keep"


@dataclass
class PreflightConfig:
    """Checks on a few batches before the first step."""

    batches: int = 2
    max_unlabelled: float = 0.5
    max_skipped: float = 0.05


@dataclass
class TrainableConfig:
    """Which parts are trained; the rest is frozen. The defaults are LLaVA's for instruction tuning.

    ``embeddings: false`` freezes token embeddings and LM head within a trained language model.
    """

    vision_tower: bool = False
    mm_projector: bool = True
    language_model: bool = True
    embeddings: bool = True


@dataclass
class StageConfig:
    """What a stage may set.

    ``peft_config``: train the language model by adapters (``models.adapters.LoraSettings``). ``compile``: true, or keywords
    of ``torch.compile`` (``models.compile.CompileSettings``).
    """

    train_loader: LoaderConfig = field(default_factory=LoaderConfig)
    eval_loaders: list[EvalLoaderConfig] = field(default_factory=list)
    eval_interval: str = "1ep"
    chat_template: str = "vicuna_v1"
    system_prompt: str | None = None
    max_seq_len: int = 2048
    max_duration: str = "1ep"
    global_train_batch_size: int = 32
    device_train_microbatch_size: int | None = None
    accumulate_train_batch_on_tokens: bool = False
    trainable: TrainableConfig = field(default_factory=TrainableConfig)
    optimizer: Spec = field(default_factory=lambda: {"name": "adamw", "lr": 2.0e-5})
    lr_by_part: dict[str, float] = field(default_factory=dict)
    scheduler: Spec = field(default_factory=lambda: {"name": "cosine_with_warmup", "t_warmup": "0.03dur"})
    activation_checkpointing: bool = False
    peft_config: Spec | None = None
    compile: Any = False
    init_from: InitFrom | None = None


@dataclass
class PrepareConfig:
    """Data made before the run when it is not there yet."""

    scenes: list[Spec] = field(default_factory=list)
    easy_vqa: list[Spec] = field(default_factory=list)


@dataclass
class EvaluationConfig:
    """What is scored when training ends, and shown with the same model blind (``evaluation.scorecard``).

    ``fusion``: also under ability fusion (``algorithms.vift.fusion.Fusion``).
    """

    dataset: DatasetConfig = field(default_factory=lambda: DatasetConfig(shuffle=False))
    majority_from: DatasetConfig | None = None
    limit: int | None = None
    batch_size: int = 16
    pictures: int = 16
    fusion: Spec | None = None


@dataclass
class RunConfig(StageConfig):
    """A whole run."""

    run_name: str = "opsin"
    run_root: str = "runs"
    seed: int = 17
    stage: str = "instruct"
    stages: dict[str, StageConfig] = field(default_factory=dict)
    reuse_stages: bool = True
    reuse_last_stage: bool = False
    model: Spec = field(default_factory=dict)
    algorithms: dict[str, Spec] = field(default_factory=dict)
    callbacks: dict[str, Spec] = field(default_factory=dict)
    loggers: dict[str, Spec] = field(default_factory=dict)
    evaluation: EvaluationConfig | None = None
    prepare: PrepareConfig = field(default_factory=PrepareConfig)
    preflight: PreflightConfig = field(default_factory=PreflightConfig)
    precision: str = "fp32"
    device: str | None = None
    parallelism_config: dict[str, Any] | None = None
    dist_timeout: float = 1800.0
    non_finite: str = "stop"
    max_skipped_batches: int = 10
    save_folder: str | None = None
    save_interval: str = "1ep"
    save_num_checkpoints_to_keep: int = 2
    autoresume: bool = True
    load_path: str | None = None
    trust_checkpoint: bool = False
    progress_bar: bool = True
    python_log_level: str | None = None
    plan: dict[str, Spec] = field(default_factory=dict)
    variables: dict[str, Any] = field(default_factory=dict)
