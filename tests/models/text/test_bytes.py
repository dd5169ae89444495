"""The byte-level text encoder: what a word is, and that padding and company change nothing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from vitascope.core.errors import InputError, PromptError, ShapeError
from vitascope.core.protocols import TextEncoder
from vitascope.models.text.bytes.config import BytesConfig
from vitascope.models.text.bytes.model import EMPTY, PADDING, UNIQUE_STEP, ByteTextEncoder, ByteTokens, tokenize

TINY = BytesConfig(width=16, depth=2, num_heads=2, byte_width=8, max_words=10, max_word_bytes=6)


def encoder() -> ByteTextEncoder:
    torch.manual_seed(0)
    model = ByteTextEncoder(TINY)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.requires_grad_(False)


def words(tokens: ByteTokens) -> list[list[str]]:
    """The words as text, prompt by prompt."""
    spelt = []
    for index, mask in zip(tokens.index_BS, tokens.mask_BS, strict=True):
        rows = tokens.words_UW[index[mask]].tolist()
        numbers = [[number for number in row if number != PADDING] for row in rows]
        spelt.append(["<empty>" if row == [EMPTY] else bytes(n - 1 for n in row).decode() for row in numbers])
    return spelt


def test_words_are_runs_of_letters_and_single_signs() -> None:
    assert words(tokenize(["A red ball, a  box!", "go\n2nd"], TINY)) == [
        ["a", "red", "ball", ",", "a", "box", "!"],
        ["go", "2nd"],
    ]
    assert words(tokenize(["A Box"], BytesConfig(lower_case=False))) == [["A", "Box"]]


def test_different_words_are_stored_once() -> None:
    tokens = tokenize(["a red ball and a red box", "a red cat"], TINY)
    assert tokens.words_UW.shape == (6, 6)
    assert tokens.index_BS[0].tolist() == [0, 1, 2, 3, 0, 1, 4]
    assert tokens.index_BS[1, :3].tolist() == [0, 1, 5]
    assert tokens.mask_BS.sum(1).tolist() == [7, 3]


@pytest.mark.parametrize("prompt", ["", "   ", "\n\t"])
def test_the_empty_prompt_is_a_word_of_its_own(prompt: str) -> None:
    tokens = tokenize([prompt], TINY)
    assert words(tokens) == [["<empty>"]]
    assert tokens.mask_BS.tolist() == [[True]]
    assert EMPTY - 1 not in range(256)  # no byte is mistaken for it


def test_unicode_is_read_as_utf8_and_long_words_are_cut() -> None:
    tokens = tokenize(["é 世界 🎈", "balloons"], TINY)
    lengths = (tokens.words_UW != PADDING).sum(1).tolist()
    assert lengths == [2, 6, 4, 6, 2]
    assert words(tokenize(["balloons"], TINY)) == [["balloo", "ns"]]
    tokenize(["a lone surrogate \ud800"], TINY)  # not encodable: replaced, not refused


@given(st.lists(st.text(max_size=12), min_size=1, max_size=4))
def test_any_text_becomes_numbers_in_range(prompts: list[str]) -> None:
    config = BytesConfig(max_words=64, max_word_bytes=5)
    tokens = tokenize(prompts, config)
    assert tokens.mask_BS[:, 0].all()
    assert set(tokens.index_BS[tokens.mask_BS].tolist()) == set(range(len(tokens.words_UW)))
    assert (tokens.words_UW[:, 0] != PADDING).all()
    assert tokens.words_UW.max() <= EMPTY
    assert len({tuple(row) for row in tokens.words_UW.tolist()}) == len(tokens.words_UW)


def test_padding_gives_few_shapes() -> None:
    tokens = tokenize(["a ball", "one two three"], TINY, num_words=8)
    assert tokens.index_BS.shape == tokens.mask_BS.shape == (2, 8)
    assert tokens.words_UW.shape == (UNIQUE_STEP, 6)
    assert words(tokens) == [["a", "ball"], ["one", "two", "three"]]


def test_prompts_that_do_not_fit_are_refused() -> None:
    with pytest.raises(PromptError, match="11 words, at most 10 fit"):
        tokenize(["a " * 11], TINY)
    with pytest.raises(PromptError, match="4 words, at most 3 fit"):
        tokenize(["a b c", "a b c d"], TINY, num_words=3)
    for wrong in ([], "a ball", [3]):
        with pytest.raises(PromptError, match="sequence of strings"):
            tokenize(wrong, TINY)  # type: ignore[arg-type]


@given(st.lists(st.sampled_from(["", "a red ball", "a ball", "wind, rain", "one two three four five six"]), min_size=2))
def test_company_and_padding_change_nothing(prompts: list[str]) -> None:
    model: TextEncoder = encoder()
    together = model(prompts)
    for row, prompt in enumerate(prompts):
        alone = model([prompt])
        length = alone.mask.shape[1]
        assert together.mask[row].sum() == length
        # the same sums in products of other sizes
        torch.testing.assert_close(together.embeddings[row, :length], alone.embeddings[0], rtol=1e-4, atol=1e-5)


def test_padded_tokens_give_the_same_embeddings() -> None:
    model = encoder()
    plain = model(["a red ball", "wind"])
    padded = model(model.tokenize(["a red ball", "wind"], num_words=9))
    assert padded.mask.shape == (2, 9)
    assert torch.equal(padded.mask[:, :3], plain.mask)
    for row, length in enumerate((3, 1)):
        torch.testing.assert_close(padded.embeddings[row, :length], plain.embeddings[row, :length])


def test_a_word_is_the_same_vector_in_every_prompt_before_its_place_is_added() -> None:
    model = encoder()
    one, other = (model.tokenize([prompt]) for prompt in ("a red ball", "the ball and a box"))
    first = model._pool(one.words_UW)[one.index_BS[0, 2]]
    second = model._pool(other.words_UW)[other.index_BS[0, 1]]
    torch.testing.assert_close(first, second)
    tokens = model.tokenize(["ball bal ballb abll"])
    near, longer, mixed = (model._pool(tokens.words_UW)[0] - row for row in model._pool(tokens.words_UW)[1:])
    assert min(near.norm(), longer.norm(), mixed.norm()) > 0.1  # the order of letters counts


def test_the_order_of_words_counts_and_one_word_moves_the_others() -> None:
    model = encoder()
    a, b, c = (
        model([prompt]).embeddings[0] for prompt in ("red ball blue box", "blue ball red box", "red ball blue cat")
    )
    assert not torch.allclose(a[1], b[1], atol=1e-3)
    assert not torch.allclose(a[0], c[0], atol=1e-3)


def test_all_weights_train() -> None:
    model = encoder().requires_grad_(True)
    model(["a red ball", ""]).embeddings.square().sum(-1).mul(torch.rand(2, 3)).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


def test_bad_configurations_are_refused() -> None:
    with pytest.raises(InputError, match="must be positive"):
        BytesConfig(max_words=0)
    with pytest.raises(ShapeError, match="heads"):
        BytesConfig(width=100, num_heads=3)
