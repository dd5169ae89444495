"""Reading a caption's attributes from the tokens of a text encoder: what it is trained on before the denoiser.

B captions, S tokens, D width, H questions (one per attribute), K answers of the largest question.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vitascope.core.tracks import TextContext
from vitascope.world.scene import (
    AMBIENCES,
    BACKGROUNDS,
    CAMERAS,
    COLOURS,
    FACE,
    MOTIONS,
    SHAPES,
    SIZES,
    SYLLABLES,
    Scene,
)

NONE = "none"
MAX_SYLLABLES = 5
_OF_SUBJECT = {"colour": tuple(COLOURS), "shape": (*SHAPES, FACE), "size": tuple(SIZES), "motion": MOTIONS}

QUESTIONS: dict[str, tuple[str, ...]] = {
    **{f"{name} 1": answers for name, answers in _OF_SUBJECT.items()},
    **{f"{name} 2": (NONE, *answers) for name, answers in _OF_SUBJECT.items()},
    "background": BACKGROUNDS,
    "camera": CAMERAS,
    "ambience": (NONE, *AMBIENCES),
    **{f"syllable {number}": (NONE, *SYLLABLES) for number in range(1, MAX_SYLLABLES + 1)},
}
"""What is asked about a caption, and the possible answers."""


def answers(scene: Scene) -> list[int]:
    """The number of the right answer to each of QUESTIONS."""
    given = {"background": scene.background, "camera": scene.camera, "ambience": scene.ambience or NONE}
    for place, subject in enumerate(scene.subjects[:2], start=1):
        given |= {f"{name} {place}": getattr(subject, name) for name in _OF_SUBJECT}
    spoken = next((subject.syllables for subject in scene.subjects if subject.syllables), ())
    given |= {f"syllable {place}": syllable for place, syllable in enumerate(spoken[:MAX_SYLLABLES], start=1)}
    return [options.index(given.get(name, NONE)) for name, options in QUESTIONS.items()]


class AttributeReader(nn.Module):
    """A learnt query per question attends to the tokens; a linear map scores its answers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        count, most = len(QUESTIONS), max(len(options) for options in QUESTIONS.values())
        self.query_embed = nn.Parameter(torch.randn(count, width) * width**-0.5)
        self.score_head = nn.Parameter(torch.randn(count, width, most) * width**-0.5)
        self.bias_head = nn.Parameter(torch.zeros(count, most))
        valid = torch.tensor([[place < len(options) for place in range(most)] for options in QUESTIONS.values()])
        self.valid: Tensor
        self.register_buffer("valid", valid, persistent=False)

    def forward(self, text: TextContext) -> Tensor:
        """Scores (B, H, K), -inf where a question has no such answer."""
        x_BSD = text.embeddings
        attention_BHS = torch.einsum("hd,bsd->bhs", self.query_embed, x_BSD)
        attention_BHS = attention_BHS.float().masked_fill(~text.mask[:, None], float("-inf")).softmax(-1)
        read_BHD = torch.einsum("bhs,bsd->bhd", attention_BHS.to(x_BSD.dtype), x_BSD)
        scores_BHK = torch.einsum("bhd,hdk->bhk", read_BHD, self.score_head).float() + self.bias_head
        return scores_BHK.masked_fill(~self.valid, float("-inf"))


def reading_loss(scores_BHK: Tensor, answers_BH: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy over captions and questions, and the share right of each question, (H,)."""
    loss = nn.functional.cross_entropy(scores_BHK.flatten(0, 1), answers_BH.flatten())
    return loss, (scores_BHK.argmax(-1) == answers_BH).float().mean(0)
