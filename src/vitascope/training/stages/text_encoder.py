"""Training the byte-level text encoder to read captions: a short lesson before it learns along with the denoiser."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitascope.core.random import derive_seed
from vitascope.models.text.bytes.config import BytesConfig
from vitascope.models.text.bytes.model import ByteTextEncoder, ByteTokens, tokenize
from vitascope.training.objectives.attributes import QUESTIONS, AttributeReader, answers, reading_loss
from vitascope.training.recipe import Recipe
from vitascope.training.stage import Batch
from vitascope.weights.checkpoint import save_checkpoint
from vitascope.world.captions import write_caption
from vitascope.world.casting import SceneMix, draw_scene

FAMILY = "bytes"


@dataclass(frozen=True)
class TextEncoderOptions:
    """The encoder and the captions it reads, padded to num_words. Validation: that many held-out ones."""

    batch_size: int = 128
    text: BytesConfig = field(default_factory=BytesConfig)
    num_words: int = 40
    mix: SceneMix = field(default_factory=lambda: SceneMix(two_subjects=0.5, face=0.3))
    validation_captions: int = 1024

    def __post_init__(self) -> None:
        self.text.check_words(self.num_words)


class EncoderAndReader(nn.Module):
    """The text encoder, and the reader that is thrown away afterwards."""

    def __init__(self, text: ByteTextEncoder) -> None:
        super().__init__()
        self.text = text
        self.reader = AttributeReader(text.width)

    def forward(self, tokens: ByteTokens) -> Tensor:
        """Scores (B, H, K) of the answers to QUESTIONS."""
        return self.reader(self.text(tokens))


def build(recipe: Recipe, device: torch.device) -> TextEncoderStage:
    """The stage of a recipe."""
    return TextEncoderStage(recipe.options, recipe.seed, recipe.loop.compile)


class TextEncoderStage:
    """Captions of random scenes and questions about them; see `training.stage.Stage`."""

    def __init__(self, options: TextEncoderOptions, seed: int, compile_loss: bool) -> None:
        self.options = options
        self.seed = seed
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(seed, "init"))
            self.net = EncoderAndReader(ByteTextEncoder(options.text))
        self._scores = torch.compile(self.scores) if compile_loss else self.scores

    @property
    def model(self) -> nn.Module:
        return self.net

    def batch(self, index: int) -> dict[str, Any]:
        """Captions as bytes, and the right answers (B, H)."""
        return self._batch("train", range(index * self.options.batch_size, (index + 1) * self.options.batch_size))

    def _batch(self, purpose: str, numbers: range) -> dict[str, Any]:
        split = "held_out" if purpose == "validation" else "train"
        seeds = [derive_seed(self.seed, purpose, number) for number in numbers]
        scenes = [draw_scene(seed, mix=self.options.mix, split=split) for seed in seeds]
        captions = [write_caption(scene, seed) for scene, seed in zip(scenes, seeds, strict=True)]
        tokens = tokenize(captions, self.options.text, self.options.num_words)
        right = torch.tensor([answers(scene) for scene in scenes])
        return {
            "answers": right,
            "words": tokens.words_UW,
            "index": tokens.index_BS,
            "mask": tokens.mask_BS,
        }

    def scores(self, tokens: ByteTokens) -> Tensor:
        """The part that is compiled."""
        return self.net(tokens)

    def loss(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        scores = self._scores(ByteTokens(batch["words"], batch["index"], batch["mask"]))
        loss, right = reading_loss(scores, batch["answers"])
        return loss, {"right": right.mean().detach(), "worst": right.min().detach()}

    def validate(self, model: nn.Module, folder: Path, step: int) -> dict[str, float]:
        """Share of right answers to each question on captions of held-out scenes."""
        assert isinstance(model, EncoderAndReader)
        device = next(model.parameters()).device
        batch = self._batch("validation", range(self.options.validation_captions))
        tokens = ByteTokens(batch["words"], batch["index"], batch["mask"]).to(device)
        _, right = reading_loss(model(tokens), batch["answers"].to(device))
        return {name.replace(" ", "_"): float(share) for name, share in zip(QUESTIONS, right, strict=True)}

    def export(self, model: nn.Module, folder: Path) -> list[Path]:
        """Write text_encoder.safetensors in half precision."""
        assert isinstance(model, EncoderAndReader)
        path = folder / "text_encoder.safetensors"
        tensors = {key: value.half() for key, value in model.text.state_dict().items()}
        save_checkpoint(path, tensors, FAMILY, model.text.config)
        return [path]
