"""One clip and batches: seeds, what is given, guidance, refusals."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from vitascope.core.errors import CapabilityError, InputError, PromptError, ShapeError
from vitascope.core.tracks import AUDIO, VIDEO
from vitascope.diffusion.guidance import Guidance
from vitascope.diffusion.samplers import SAMPLERS, Step
from vitascope.tasks.camera import named_camera_path
from vitascope.tasks.generate import generate, generate_batch
from vitascope.tasks.pipeline import Pipeline
from vitascope.tasks.request import GenerateRequest, Given, Keyframe
from vitascope.tasks.settings import recipe_of

PROMPT = "a red ball bounces"


def request(pipeline: Pipeline, **changes: object) -> GenerateRequest:
    return replace(GenerateRequest(PROMPT, format=pipeline.defaults.clip), **changes)


def picture(seed: int = 0, height: int = 32, width: int = 32) -> Tensor:
    return torch.randint(0, 256, (3, height, width), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def video(num_frames: int = 9) -> Tensor:
    return torch.stack([picture(index) for index in range(num_frames)])


def tone(num_samples: int = 12000) -> Tensor:
    return torch.sin(torch.arange(num_samples) * 0.2) * 0.5


def steps_of(pipeline: Pipeline, wanted: GenerateRequest) -> list[Step]:
    steps: list[Step] = []
    generate(pipeline, wanted, steps.append)
    return steps


def test_a_clip_has_the_format_asked_for(pipeline: Pipeline) -> None:
    fmt = replace(pipeline.defaults.clip, width_px=40, height_px=24, num_frames=5)
    made = generate(pipeline, request(pipeline, format=fmt))
    assert made.clip.frames.shape == (5, 3, 24, 40)
    assert made.clip.frames.dtype == torch.uint8
    assert made.clip.frames.float().std() > 1
    assert made.clip.samples is not None
    assert made.clip.samples.shape == (fmt.num_samples,)
    assert made.clip.samples.abs().max() <= 1
    assert set(made.seconds) == {"encode", "text", "denoise", "decode"}


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_same_seed_gives_the_same_clip_and_another_seed_another(pipeline: Pipeline, sampler: str) -> None:
    first, again, other = (
        generate(pipeline, request(pipeline, seed=seed, sampler=sampler, num_inference_steps=2)) for seed in (5, 5, 6)
    )
    assert torch.equal(first.clip.frames, again.clip.frames)
    assert first.clip.samples is not None
    assert again.clip.samples is not None
    assert torch.equal(first.clip.samples, again.clip.samples)
    assert not torch.equal(first.clip.frames, other.clip.frames)


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "few_step"])
def test_a_batch_equals_each_clip_alone(pipeline: Pipeline, sampler: str) -> None:
    bound = replace(pipeline.defaults, guidance=Guidance(2.0, cross_modal={VIDEO: 1.5}))
    bound_pipeline = replace(pipeline, defaults=bound)
    requests = [
        request(pipeline, seed=1, sampler=sampler, negative_prompt="a dull blue box on a brown background"),
        request(pipeline, prompt="a blue star spins", seed=2, sampler=sampler, given=Given((Keyframe(0, picture()),))),
    ]
    together = generate_batch(bound_pipeline, requests)
    for single, one in zip(requests, together, strict=True):
        alone = generate(bound_pipeline, single)
        # Products of other shapes sum in another order: some 1e-6 of values of unit scale, which may move a rounded
        # pixel by one. A clip that depended on its neighbour would differ by tens.
        assert (alone.clip.frames.int() - one.clip.frames.int()).abs().max() <= 1
        assert alone.clip.samples is not None
        assert one.clip.samples is not None
        torch.testing.assert_close(one.clip.samples, alone.clip.samples, atol=1e-4, rtol=0)
        assert alone.recipe == one.recipe


def test_a_batch_shares_its_settings(pipeline: Pipeline) -> None:
    for changes in ({"num_inference_steps": 2}, {"guidance_scale": 3.0}, {"sampler": "euler"}):
        with pytest.raises(InputError, match="clips of a batch share"):
            generate_batch(pipeline, [request(pipeline), request(pipeline, **changes)])
    with pytest.raises(InputError, match="at least one"):
        generate_batch(pipeline, [])


def test_an_image_and_a_keyframe_end_at_their_latents(pipeline: Pipeline) -> None:
    first, middle = picture(1), picture(2, 64, 64)
    given = Given((Keyframe(0.0, first), Keyframe(4 / 12, middle), Keyframe(8 / 12, picture(3), strength=0.5)))
    final = steps_of(pipeline, request(pipeline, given=given))[-1].tracks[VIDEO]
    codec = pipeline.video_codec
    still = codec.encode(first.float()[None, :, None] / 127.5 - 1)
    assert torch.equal(final.values[:, :, 0], still[:, :, 0])
    small = torch.nn.functional.interpolate(middle[None].float(), (32, 32), mode="bicubic", antialias=True)
    held = (small.round().clamp(0, 255) / 127.5 - 1)[:, :, None].expand(-1, -1, 5, -1, -1)
    assert torch.equal(final.values[:, :, 1], codec.encode(held)[:, :, 1])
    soft = codec.encode((picture(3).float()[None, :, None] / 127.5 - 1).expand(-1, -1, 5, -1, -1))[:, :, 1]
    assert not torch.equal(final.values[:, :, 2], soft)


def test_strength_says_where_a_keyframe_starts(pipeline: Pipeline) -> None:
    from vitascope.tasks.known import start_tracks

    fmt = pipeline.defaults.clip
    clear, none, half = (
        start_tracks(pipeline, fmt, Given((Keyframe(0.0, picture(), strength),)), 3)[VIDEO] for strength in (1, 0, 0.5)
    )
    assert [track.noise[0, 0, :, 0, 0].tolist() for track in (clear, none, half)] == [[0, 1, 1], [1, 1, 1], [0.5, 1, 1]]
    # Rectified flow: half-way is the mean of the latent and the noise, and the noise is that of the seed.
    torch.testing.assert_close(half.values[:, :, 0], (clear.values[:, :, 0] + none.values[:, :, 0]) / 2)
    assert torch.equal(half.values[:, :, 1:], clear.values[:, :, 1:])


def test_a_given_sound_is_kept_and_followed(pipeline: Pipeline) -> None:
    made = generate(pipeline, request(pipeline, given=Given(audio=tone())))
    assert made.clip.samples is not None
    assert torch.equal(made.clip.samples, tone())
    short = generate(pipeline, request(pipeline, given=Given(audio=tone(6000))))
    assert short.clip.samples is not None
    assert torch.equal(short.clip.samples, torch.cat([tone(6000), torch.zeros(6000)]))
    assert not torch.equal(made.clip.frames, short.clip.frames)
    level = steps_of(pipeline, request(pipeline, given=Given(audio=tone())))[0].tracks[AUDIO].noise
    assert not level.any()


def test_a_given_video_is_kept_and_followed(pipeline: Pipeline) -> None:
    made = generate(pipeline, request(pipeline, given=Given(video=video())))
    assert torch.equal(made.clip.frames, video())
    other = generate(pipeline, request(pipeline, given=Given(video=video().flip(0))))
    assert made.clip.samples is not None
    assert other.clip.samples is not None
    assert not torch.equal(made.clip.samples, other.clip.samples)
    with pytest.raises(ShapeError, match="the given video has 5 frames, the clip 9"):
        generate(pipeline, request(pipeline, given=Given(video=video(5))))


def test_a_camera_moves_the_clip(pipeline: Pipeline) -> None:
    fmt = pipeline.defaults.clip
    path = named_camera_path("pans right", fmt)
    assert path.shape == (9, 7)
    assert (path[1:, 3] > path[:-1, 3]).all()
    plain, moved = (generate(pipeline, request(pipeline, given=Given(camera=camera))) for camera in (None, path))
    assert not torch.equal(plain.clip.frames, moved.clip.frames)
    one = replace(fmt, num_frames=1)
    assert len(generate(pipeline, request(pipeline, format=one, given=Given(camera=path[:1]))).clip.frames) == 1
    with pytest.raises(InputError, match=r"camera 'flies' is not known; valid values: .*pans left"):
        named_camera_path("flies", fmt)
    with pytest.raises(ShapeError, match=r"is \(9, 7\), got \(5, 7\)"):
        generate(pipeline, request(pipeline, given=Given(camera=path[:5])))


class Watched:
    """A denoiser or text encoder that records the batch sizes it is called with."""

    def __init__(self, inner: object) -> None:
        self.inner, self.sizes = inner, []

    def __getattr__(self, name: str) -> object:
        return getattr(self.inner, name)

    def __call__(self, first: object, *rest: object) -> object:
        self.sizes.append(len(first[VIDEO].values) if isinstance(first, dict) else len(first))  # type: ignore[arg-type]
        return self.inner(first, *rest)  # type: ignore[operator]


def test_guidance_of_one_asks_for_no_unconditional_half(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    def watched(**changes: object) -> tuple[list[int], list[int]]:
        denoiser, text = Watched(pipeline.denoiser), Watched(pipeline.text_encoder)
        generate(replace(pipeline, denoiser=denoiser, text_encoder=text), request(pipeline, **changes))
        return denoiser.sizes, text.sizes

    assert watched() == ([2, 2, 2], [2])
    assert watched(guidance_scale=1.0) == ([1, 1, 1], [1])
    monkeypatch.setattr("vitascope.diffusion.guidance.BUSY_VALUES", 1)  # a large clip on a CPU goes half by half
    assert watched() == ([1] * 6, [2])
    plain, negative = (generate(pipeline, request(pipeline, negative_prompt=text)) for text in ("", "a blue box"))
    assert not torch.equal(plain.clip.frames, negative.clip.frames)


def test_scales_by_track_hold_until_another_scale_is_asked_for(pipeline: Pipeline) -> None:
    by_track = replace(pipeline, defaults=replace(pipeline.defaults, guidance=Guidance(2.0, {AUDIO: 4.0})))
    same = generate(by_track, request(pipeline, guidance_scale=2.0))
    plain = generate(pipeline, request(pipeline, guidance_scale=2.0))
    assert torch.equal(generate(by_track, request(pipeline)).clip.frames, same.clip.frames)
    assert not torch.equal(plain.clip.frames, same.clip.frames)
    other = [generate(p, request(pipeline, guidance_scale=3.0)).clip.frames for p in (pipeline, by_track)]
    assert torch.equal(*other)


def test_raising_from_the_report_cancels(pipeline: Pipeline) -> None:
    seen: list[int] = []

    def report(step: Step) -> None:
        seen.append(step.index)
        if step.index == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(pipeline, request(pipeline), report)
    assert seen == [0, 1]


def test_the_recipe_is_json_and_whole(pipeline: Pipeline) -> None:
    recipe = recipe_of(pipeline, request(pipeline, seed=3))
    assert json.loads(json.dumps(recipe)) == recipe
    assert recipe == {
        "prompt": PROMPT,
        "negative_prompt": "",
        "width": 32,
        "height": 32,
        "fps": 12.0,
        "num_frames": 9,
        "seed": 3,
        "num_inference_steps": 3,
        "guidance_scale": 2.0,
        "sampler": "dpmpp_2m",
        "levels": None,
        "guidance_rescale": 0.0,
        "guidance_interval": [0.0, 1.0],
        "stg_scale": 0.0,
        "stg_layers": [],
        "stg_by": "attention",
        "step_cache": None,
        "image_cond_noise_scale": 0.0,
        "decode_timestep": None,
        "decode_noise_scale": None,
        "model": pipeline.name,
        "weights": pipeline.fingerprint,
        "precision": "fp32",
    }
    assert len(pipeline.fingerprint) == 16


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_inference_steps": 0}, "lies in 1..1000, got 0"),
        ({"num_inference_steps": 1001}, "lies in 1..1000"),
        ({"guidance_scale": NAN}, r"guidance scale lies in \[0, 30\]"),
        ({"guidance_scale": -1.0}, r"guidance scale lies in \[0, 30\]"),
        ({"decode_timestep": 1.5}, r"the timestep of a decoder lies in \[0, 1\], got 1.5"),
        ({"decode_noise_scale": NAN}, r"the noise_scale of a decoder lies in \[0, 1\], got nan"),
        ({"decode_timestep": 0.1}, "CausalVideoCodec is not conditioned on noise: leave decode_timestep"),
        ({"seed": -1}, "the seed lies in"),
        ({"seed": 2**63}, "the seed lies in"),
        ({"prompt": " "}, "the prompt is empty"),
        ({"prompt": "a \udc80"}, "the prompt is not text"),
        ({"negative_prompt": "a\0b"}, "the prompt is not text"),
        ({"sampler": ""}, "sampler '' is not known; valid values: euler"),
        ({"prompt": "ball " * 65}, "the prompt has 65 words, at most 64 fit"),
    ],
)
def test_settings_that_cannot_be_are_refused(pipeline: Pipeline, changes: dict[str, object], words: str) -> None:
    with pytest.raises(InputError, match=words):
        generate(pipeline, request(pipeline, **changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"width_px": 36}, "width 36 px does not fit: it must be a multiple of 8; nearest: 32, 40"),
        ({"height_px": 4}, "height 4 px does not fit: .* nearest: 8"),
        ({"width_px": 80000}, "width 80000 px is too large; at most 8192 px"),
        ({"num_frames": 10}, "10 frames do not fit: .*nearest: 9, 13"),
        ({"fps": INF}, "fps must be positive and finite, got inf"),
        ({"fps": 0.5}, "frame rate lies in 1..240 fps, got 0.5"),
        ({"sample_rate_hz": 8000}, "sound is made at 16000 Hz, not at 8000 Hz"),
    ],
)
def test_formats_that_do_not_fit_are_refused_with_their_neighbours(
    pipeline: Pipeline, changes: dict[str, float], words: str
) -> None:
    with pytest.raises(ShapeError, match=words):
        generate(pipeline, request(pipeline, format=replace(pipeline.defaults.clip, **changes)))


def test_what_is_given_must_agree() -> None:
    for time_s in (-1.0, NAN, INF):
        with pytest.raises(InputError, match="time of a keyframe"):
            Keyframe(time_s, picture())
    for strength in (-0.1, 1.1, NAN):
        with pytest.raises(InputError, match="strength of a keyframe"):
            Keyframe(0.0, picture(), strength)
    with pytest.raises(InputError, match="known whole"):
        Given(audio=tone(), video=video())
    with pytest.raises(InputError, match="known whole"):
        Given((Keyframe(0, picture()),), video=video())
    with pytest.raises(PromptError):
        GenerateRequest("")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (Given((Keyframe(0.75, picture()),)), "lies after the last frame, at 0.667 s"),
        (Given((Keyframe(0.1, picture()), Keyframe(0.3, picture()))), "fall on one latent frame; leave 4 frames"),
        (Given((Keyframe(0.1, picture()),), past=video(5)), "part that is already there"),
        (Given(past=video(9)), "nothing is left to make"),
        (Given(past=video(4)), "4 frames do not fit"),
    ],
)
def test_what_is_given_must_fit_the_clip(pipeline: Pipeline, given: Given, words: str) -> None:
    with pytest.raises(InputError, match=words):
        generate(pipeline, request(pipeline, given=given))


def test_a_model_that_cannot_is_refused(pipeline: Pipeline) -> None:
    class Limited(Watched):
        @property
        def capabilities(self) -> object:
            return replace(pipeline.denoiser.capabilities, noise="clip", camera=False)

    limited = replace(pipeline, denoiser=Limited(pipeline.denoiser))
    with pytest.raises(CapabilityError, match="one noise level a clip"):
        generate(limited, request(pipeline, given=Given((Keyframe(0, picture()),))))
    with pytest.raises(CapabilityError, match="takes no camera path"):
        generate(limited, request(pipeline, given=Given(camera=torch.zeros(9, 7))))
    assert len(generate(limited, request(pipeline)).clip.frames) == 9
