"""Everything a training run is made of. The same settings on the same machine give the same weights, bit for bit."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from lowrank_kit.data.blocks import PACKINGS
from lowrank_kit.errors import UsageError, did_you_mean
from lowrank_kit.optim import parse_overrides
from lowrank_kit.optim.modes import TOPK
from lowrank_kit.optim.rules import RULES
from lowrank_kit.optim.schedule import RankSchedule
from lowrank_kit.scaling.rules import DEPTH_RULES

OPTIMIZERS = tuple(RULES)
LR_SCHEDULES = {
    "cosine": "cosine",
    "linear": "linear",
    "constant": "constant_with_warmup",
    "wsd": "warmup_stable_decay",
}
# What a setting left out means stands here, once. Those of numuon, muon and adamw were chosen in evals/defaults, by
# runs of 400 steps; there muon and adamw fold better with spectral decay, but without it are what their names say.
_PLAIN = {"momentum": 0.95, "nesterov": None, "spectral_decay": 0.0, "rank": "fixed:0.7"}
RECIPES: dict[str, dict[str, Any]] = {
    "numuon": {**_PLAIN, "lr": 1e-2, "momentum": 0.9, "nesterov": True, "spectral_decay": 0.6},
    "muon": {**_PLAIN, "lr": 6e-3, "momentum": 0.9},
    "adamw": {**_PLAIN, "lr": 2e-3},
    "sgd": {**_PLAIN, "lr": 3e-2},
}
# Settings that say where a run computes and what it keeps, and not what it computes: a resume may have others.
PLACEMENT = ("fsdp", "replicas", "keep_checkpoints")
# Setting -> its least value, and one that is usual.
_LEAST = {
    "lora": (1, 16),
    "lora_alpha": (1, 32),
    "steps": (1, 1000),
    "tokens": (1, 10**6),
    "batch_size": (1, 8),
    "accumulate": (1, 1),
    "block_tokens": (2, 256),
    "vocab_size": (1, 4096),
    "eval_blocks": (1, 64),
    "log_every": (1, 10),
    "spectra_every": (0, 100),
    "eval_every": (0, 100),
    "save_every": (0, 100),
    "keep_checkpoints": (1, 2),
    "replicas": (1, 2),
    "weight_decay": (0, 0.1),
    "spectral_decay": (0, 0.4),
    "clip": (0, 1),
}


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """Settings of `lowrank train`. What is None here has a default for each optimizer, which `RECIPES` holds.

    Args:
        model: checkpoint to fine-tune, a folder or a hub name. Exactly one of `model` and `model_config`.
        model_config: preset or config.json of a model trained from scratch.
        text: text source; None is the standard library. One whose rows are conversations (`is_chat`) is learned for
            its answers.
        lora: rank of LoRA adapters, which are trained in place of the model; None trains the whole model.
        lora_alpha: their scale is alpha / rank; None is twice the rank.
        lora_roles: roles of the matrices that get one; none named: all.
        tokenizer: folder or hub name of a tokenizer; None takes the model's own or trains a byte-level BPE.
        vocab_size: of a tokenizer trained here.
        optimizer: numuon, muon, adamw or sgd.
        lr: peak learning rate.
        adamw_lr: peak learning rate of embeddings, head and vectors, which are left to AdamW; None is
            lr, or AdamW's default where lr is left out too.
        lr_schedule: cosine, linear, constant or wsd, after the warm-up; wsd is constant and then decays by 1 - sqrt
            of the progress (arXiv 2405.18392).
        warmup: share of the steps with a rising learning rate.
        decay_share: of wsd, share of the steps in which it decays.
        min_lr: of cosine and wsd, the last learning rate as a share of the peak.
        weight_decay: decoupled.
        spectral_decay: of the matrices, see `NuMuon`.
        momentum: of numuon, muon and sgd.
        nesterov: whether these step along Nesterov's look ahead.
        rank: rank schedule of numuon, see `RankSchedule.parse`.
        topk: how numuon finds its step: warm, krylov, exact or filter.
        mup_base: preset, folder or config.json of a smaller model that these settings were tuned on: spectral muP
            carries them over to `model_config`, see `MuP`.
        mup_depth_rule: its rule for the depth, k2, k1 or none.
        overrides: PATTERN=RULE or PATTERN=KEY=VALUE, for parameters by name: see `parse_overrides`.
        steps: optimizer steps. Exactly one of `steps` and `tokens`.
        tokens: training tokens, rounded up to whole steps.
        batch_size: sequences in a forward pass, over all processes.
        accumulate: forward passes in a step.
        block_tokens: tokens in a sequence.
        clip: largest gradient norm; 0 does not clip.
        bf16: bfloat16 autocast, weights stay float32.
        checkpoint_activations: compute those within a block again in the backward pass instead of keeping them.
        compile: compile the model with torch.compile; on CUDA this allows TF32.
        trackers: of transformers, as tensorboard, wandb or trackio, beside the log that is always written.
        spectra_every: steps between measurements of the effective rank, see `plan_ranks`; 0 never measures.
        eval_every: steps between validations; before the first step and after the last there always is one.
        eval_blocks: held-out sequences in a validation.
        save_every: steps between checkpoints for `--resume`; 0 keeps none.
        keep_checkpoints: how many of them stay, the newest.
        log_every: steps between log lines.
        max_bytes: most bytes of text to take from the source.
        stream: tokenize the text once into files in the cache, and read it from there; None does so for a source of
            more than 256 MB of text, see `text_bytes`.
        packing: "blocks" lets attention reach over all of a block, "documents" keeps it inside the documents.
        seed: of weights, order of the text and dropout.
        fsdp: shard weights and optimizer over the processes (FSDP2), which otherwise hold a replica each (DDP).
        replicas: groups of processes over each of which the sharded model lies whole (HSDP).

    Raises:
        UsageError: settings that contradict each other or make no sense.
    """

    model: str | None = None
    model_config: str | None = None
    text: str | None = None
    lora: int | None = None
    lora_alpha: int | None = None
    lora_roles: tuple[str, ...] = ()
    tokenizer: str | None = None
    vocab_size: int = 4096
    optimizer: str = "numuon"
    lr: float | None = None
    adamw_lr: float | None = None
    lr_schedule: str = "cosine"
    warmup: float = 0.05
    decay_share: float = 0.2
    min_lr: float = 0.0
    weight_decay: float = 0.0
    spectral_decay: float | None = None
    momentum: float | None = None
    nesterov: bool | None = None
    rank: str | None = None
    topk: str = "warm"
    mup_base: str | None = None
    mup_depth_rule: str = "k2"
    overrides: tuple[str, ...] = ()
    steps: int | None = None
    tokens: int | None = None
    batch_size: int = 8
    accumulate: int = 1
    block_tokens: int = 256
    clip: float = 1.0
    bf16: bool = False
    checkpoint_activations: bool = False
    compile: bool = False
    trackers: tuple[str, ...] = ()
    spectra_every: int = 0
    eval_every: int = 0
    eval_blocks: int = 64
    save_every: int = 0
    keep_checkpoints: int = 2
    log_every: int = 10
    max_bytes: int | None = None
    stream: bool | None = None
    packing: str = "blocks"
    seed: int = 0
    fsdp: bool = False
    replicas: int = 1

    def __post_init__(self) -> None:
        if (self.model is None) == (self.model_config is None):
            raise UsageError(
                "give exactly one of MODEL (fine-tune a checkpoint) and --model-config (train from scratch)",
                hint="lowrank train --model-config 1m --steps 200 -o run",
            )
        if self.lora is None and (self.lora_alpha is not None or self.lora_roles):
            raise UsageError("--lora-alpha and --lora-roles are of --lora, which is not given", hint="--lora 16")
        if self.lora is not None and self.model is None:
            raise UsageError(
                "--lora fine-tunes a MODEL: adapters beside random weights learn little", hint="leave out --lora"
            )
        if self.lora is not None and self.spectra_every:
            raise UsageError(
                "--spectra-every measures the matrices, which --lora leaves as they are", hint="leave out one of them"
            )
        if self.lora is not None and self.fsdp:
            raise UsageError("adapters are not sharded: --lora and --fsdp do not go together", hint="leave out --fsdp")
        if self.mup_base is not None and self.model is not None:
            raise UsageError(
                "--mup-base is for training from scratch: it scales the random weights, too", hint="--model-config 15m"
            )
        if self.mup_depth_rule not in DEPTH_RULES:
            raise UsageError(
                f'unknown depth rule "{self.mup_depth_rule}"', hint=did_you_mean(self.mup_depth_rule, DEPTH_RULES)
            )
        if (self.steps is None) == (self.tokens is None):
            raise UsageError("give exactly one of --steps and --tokens", hint="--steps 1000")
        if self.optimizer not in OPTIMIZERS:
            raise UsageError(f'unknown optimizer "{self.optimizer}"', hint=did_you_mean(self.optimizer, OPTIMIZERS))
        if self.lr_schedule not in LR_SCHEDULES:
            raise UsageError(
                f'unknown lr schedule "{self.lr_schedule}"', hint=did_you_mean(self.lr_schedule, LR_SCHEDULES)
            )
        for name, (least, example) in _LEAST.items():
            value = getattr(self, name)
            if value is not None and not least <= value < math.inf:
                hint = f"--{name.replace('_', '-')} {example}"
                raise UsageError(f"{name} must be at least {least}, got {value:g}", hint=hint)
        if self.packing not in PACKINGS:
            raise UsageError(f'unknown packing "{self.packing}"', hint=did_you_mean(self.packing, PACKINGS))
        if self.topk not in TOPK:
            raise UsageError(f'unknown topk "{self.topk}"', hint=did_you_mean(self.topk, TOPK))
        if not 0 <= self.chosen("momentum") < 1:
            raise UsageError(f"momentum must be in [0, 1), got {self.momentum:g}", hint="--momentum 0.95")
        if not 0 <= self.warmup < 1:
            raise UsageError(
                f"warmup is a share of the steps, 0 <= warmup < 1, got {self.warmup:g}", hint="--warmup 0.05"
            )
        self._check_decay()
        for name, example in (("lr", RECIPES[self.optimizer]["lr"]), ("adamw_lr", RECIPES["adamw"]["lr"])):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                hint = f"--{name.replace('_', '-')} {example:g}"
                raise UsageError(f"{name} must be above 0, got {value:g}", hint=hint)
        # The optimizer reads them too, but only when the text has been read and the model built.
        RankSchedule.parse(self.chosen("rank"))
        parse_overrides(self.overrides)

    def _check_decay(self) -> None:
        if not 0 <= self.min_lr < 1:
            raise UsageError(
                f"min_lr is a share of the peak, 0 <= min_lr < 1, got {self.min_lr:g}", hint="--min-lr 0.1"
            )
        if self.min_lr and self.lr_schedule not in ("cosine", "wsd"):
            raise UsageError(
                f'min_lr is for the lr schedules cosine and wsd, not for "{self.lr_schedule}"',
                hint="--lr-schedule wsd",
            )
        if self.lr_schedule == "wsd" and not 0 < self.decay_share <= 1 - self.warmup:
            raise UsageError(
                f"decay_share must be above 0 and at most {1 - self.warmup:g}, what warmup leaves of the steps, "
                f"got {self.decay_share:g}",
                hint="--decay-share 0.2",
            )

    def scheduler(self) -> dict[str, Any]:
        """The learning rate's schedule as transformers' TrainingArguments take it."""
        warmup = round(self.warmup * self.num_steps)
        name, options = LR_SCHEDULES[self.lr_schedule], dict[str, Any]()
        if self.lr_schedule == "wsd":
            decay = min(round(self.decay_share * self.num_steps), self.num_steps - warmup)
            options = {"num_decay_steps": decay, "decay_type": "1-sqrt", "min_lr_ratio": self.min_lr}
        elif self.min_lr:
            name, options = "cosine_with_min_lr", {"min_lr_rate": self.min_lr}
        return {"lr_scheduler_type": name, "lr_scheduler_kwargs": options, "warmup_steps": warmup}

    @property
    def step_tokens(self) -> int:
        """Tokens in an optimizer step."""
        return self.batch_size * self.accumulate * self.block_tokens

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the run."""
        if self.steps is not None:
            return self.steps
        assert self.tokens is not None
        return -(-self.tokens // self.step_tokens)

    @property
    def peak_lr(self) -> float:
        """The learning rate, or the optimizer's default."""
        return self.chosen("lr")

    @property
    def peak_adamw_lr(self) -> float:
        """The learning rate of what is no matrix."""
        given = self.lr if self.adamw_lr is None else self.adamw_lr
        return RECIPES["adamw"]["lr"] if given is None else given

    @property
    def chosen_lora_alpha(self) -> int:
        """Alpha of the adapters."""
        assert self.lora is not None
        return 2 * self.lora if self.lora_alpha is None else self.lora_alpha

    def chosen(self, name: str) -> Any:
        """A setting of the optimizer: as given, or its default for this optimizer."""
        given = getattr(self, name)
        return RECIPES[self.optimizer][name] if given is None else given
