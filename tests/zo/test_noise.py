import hashlib
import math
import os
import subprocess
import sys

import pytest
import torch
from scipy import stats

from dist_vlcl.zo.noise import (
    DROPOUT_STREAM,
    Key,
    NoiseField,
    StepNoise,
    derive_seed,
    dropout_mask_by_row,
    name_id,
    normals_by_row,
    philox4x32,
)
from tests.helpers.naive_step import normals

KEY = Key(seed=0x1234_5678_9ABC_DEF0, step=7)
SIZES = {"language.1/router": 6, "language.1/up_weight": 1003, "vision.1/router": 6, "vision.2/down_weight": 4096}


def whole_field(names=SIZES) -> NoiseField:
    return NoiseField([(name, SIZES[name]) for name in names])


def philox_by_hand(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 in Python's integers, round by round as in Salmon et al. 2011."""
    for r in range(10):
        k0, k1 = ((key[0] + r * 0x9E3779B9) % 2**32, (key[1] + r * 0xBB67AE85) % 2**32)
        high0, low0 = divmod(0xD2511F53 * counter[0], 2**32)
        high1, low1 = divmod(0xCD9E8D57 * counter[2], 2**32)
        counter = [high1 ^ counter[1] ^ k0, low1, high0 ^ counter[3] ^ k1, low0]
    return counter


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_gives_the_known_answers_of_random123(counter, key, words):
    low, high = (int(k, 16) for k in key.split())
    drawn = philox4x32(tuple(torch.tensor([int(c, 16)]) for c in counter.split()), low | high << 32)
    assert " ".join(f"{word % 2**32:08x}" for word in drawn[0].tolist()) == words
    assert philox_by_hand([int(c, 16) for c in counter.split()], [low, high]) == [int(w, 16) for w in words.split()]


KERNEL = """
import torch
from dist_vlcl.zo import kernel, noise
counter = [torch.arange(300)[None], torch.tensor(2**32 - 5), torch.tensor(7), (254 + 256 * torch.tensor([0, 70_000, 2**24 - 1]))[:, None]]
for chosen in (counter, [counter[0][0], *counter[1:3], torch.tensor(3)]):
    for seed in (0, 1, 0x9ABCDEF0, 0x123456789ABCDEF0, 2**63, 2**64 - 1):
        assert torch.equal(kernel.philox(torch.broadcast_tensors(*chosen), seed), noise.philox4x32(chosen, seed)), seed
"""


def test_the_kernel_for_gpus_gives_the_same_words_in_triton_s_interpreter():
    pytest.importorskip("triton", reason="triton comes with torch on Linux")
    subprocess.run([sys.executable, "-c", KERNEL], env={**os.environ, "TRITON_INTERPRET": "1"}, check=True, timeout=300)


def test_normals_are_box_muller_of_the_documented_counter():
    name, stream = "vision.3/up_weight", 5
    drawn = normals(name, 11, KEY, stream)
    identity = int.from_bytes(hashlib.blake2s(name.encode(), digest_size=4).digest(), "little")
    for i, value in enumerate(drawn.tolist()):
        words = philox_by_hand([i // 4, identity, KEY.step, stream], [KEY.seed % 2**32, KEY.seed >> 32])
        w, angle = words[2 * (i % 4 // 2) :][:2]
        expected = math.sqrt(-2 * math.log((w + 1) / 2**32)) * (math.cos, math.sin)[i % 2](2 * math.pi * angle / 2**32)
        assert value == pytest.approx(expected, abs=2e-6)


def test_signs_are_the_bits_of_the_documented_counter():
    name, stream = "vision.3/up_weight", 5
    drawn = NoiseField([(name, 200)]).signs(KEY, stream).tolist()
    words = [philox_by_hand([block, name_id(name), KEY.step, stream], [KEY.seed % 2**32, KEY.seed >> 32]) for block in range(2)]
    assert drawn == [2.0 * (words[i // 128][i % 128 // 32] >> i % 32 & 1) - 1 for i in range(200)]


def test_router_noise_and_masks_are_drawn_from_the_documented_counter_row_by_row():
    """Streams 254 and 255, one row of counters per sample; a mask compares the 16-bit halves of the words, the low half first."""
    rows, low, high = [3, 70_000], KEY.seed % 2**32, KEY.seed >> 32
    noise = StepNoise(KEY, {"vision": torch.tensor(rows)})
    router, dropout_mask = noise.router("vision", 2, 2), noise.dropout_mask("vision", 2, 3, 4, 0.1).flatten(1)
    for place, row in enumerate(rows):
        words = philox_by_hand([0, name_id("router/vision/2"), KEY.step, 254 + 256 * row], [low, high])
        radius = math.sqrt(-2 * math.log((words[0] + 1) / 2**32))
        expected = [radius * f(2 * math.pi * words[1] / 2**32) for f in (math.cos, math.sin)]
        assert router[place].tolist() == pytest.approx(expected, abs=2e-6)
        drawn = [philox_by_hand([b, name_id("dropout/vision/2"), KEY.step, 255 + 256 * row], [low, high]) for b in range(2)]
        halves = [half for words in drawn for word in words for half in (word & 0xFFFF, word >> 16)]
        assert dropout_mask[place].tolist() == [half >= round(0.1 * 65536) for half in halves[:12]]


def test_names_and_seeds_keep_their_identity_in_every_version():
    """A journal outlives the code that wrote it."""
    assert name_id("vision.3/down_weight") == 0x553921FC
    assert derive_seed(0, "adapters") == 7119340175292978580


def test_a_field_draws_for_each_parameter_what_it_draws_alone():
    drawn = whole_field().normals(KEY, 3)
    assert torch.equal(drawn, torch.cat([normals(name, n, KEY, 3) for name, n in SIZES.items()]))


@pytest.mark.parametrize("draw", ["normals", "signs"])
@pytest.mark.parametrize("numel", [1, 4, 127, 128, 129, 1000])
def test_a_shorter_parameter_draws_the_head_of_a_longer_one(draw, numel):
    name = "language.1/up_weight"
    assert torch.equal(getattr(NoiseField([(name, numel)]), draw)(KEY, 0), getattr(whole_field([name]), draw)(KEY, 0)[:numel])


@pytest.mark.parametrize("draw", ["normals", "signs"])
def test_a_parameter_draws_the_same_whichever_others_are_drawn_and_in_whatever_order(draw):
    names = list(SIZES)
    parts = dict(zip(names, getattr(whole_field(names), draw)(KEY, 1).split(list(SIZES.values())), strict=True))
    reverse = dict(zip(names[::-1], getattr(whole_field(names[::-1]), draw)(KEY, 1).split(list(SIZES.values())[::-1]), strict=True))
    for name in names:
        assert torch.equal(parts[name], reverse[name])
        assert torch.equal(parts[name], getattr(whole_field([name]), draw)(KEY, 1))


N = 1 << 16
BASE = ("vision.2/down_weight", KEY, 0)
OTHERS = {
    "seed": ("vision.2/down_weight", Key(KEY.seed + 1, KEY.step), 0),
    "high bit of the seed": ("vision.2/down_weight", Key(KEY.seed ^ 1 << 63, KEY.step), 0),
    "step": ("vision.2/down_weight", Key(KEY.seed, KEY.step + 1), 0),
    "layer": ("vision.3/down_weight", KEY, 0),
    "branch": ("language.2/down_weight", KEY, 0),
    "stream": ("vision.2/down_weight", KEY, 1),
}


@pytest.mark.parametrize("what", OTHERS)
def test_another_seed_step_name_or_stream_is_uncorrelated(what):
    """The correlation of n independent pairs has sigma 1 / sqrt(n): below 4 sigma."""
    (name, key, stream), (other, other_key, other_stream) = BASE, OTHERS[what]
    assert abs(float((normals(name, N, key, stream) * normals(other, N, other_key, other_stream)).mean())) < 4 / math.sqrt(N)
    a = NoiseField([(name, N)]).signs(key, stream)
    b = NoiseField([(other, N)]).signs(other_key, other_stream)
    assert abs(float((a * b).mean())) < 4 / math.sqrt(N)


def test_neighbours_are_uncorrelated():
    z = normals(*BASE[:1], N, *BASE[1:])
    for lag in (1, 2, 3, 4, 5, 8, 16):
        assert abs(float((z[lag:] * z[:-lag]).mean())) < 4 / math.sqrt(N - lag)


def test_a_million_normals_have_the_moments_and_the_law_of_a_normal():
    """Moments within 4 sigma: the variances of z, z^2, z^3, z^4 are 1, 2, 15, 96; Kolmogorov-Smirnov at 0.1 %."""
    n = 1 << 20
    z = normals("vision.1/up_weight", n, KEY, 0).double()
    moments = (z.mean(), z.var() - 1, (z**3).mean(), (z**4).mean() - 3)
    for moment, variance in zip(moments, (1, 2, 15, 96), strict=True):
        assert abs(float(moment)) < 4 * math.sqrt(variance / n)
    assert stats.kstest(z.numpy(), "norm").statistic < 1.95 / math.sqrt(n)
    assert 4.3 < float(z.abs().max()) < 6.67  # the tail is there; 32 bits end at sqrt(2 ln 2^32)


def test_signs_are_plus_or_minus_one_and_fair():
    signs = NoiseField([("vision.1/up_weight", 1 << 20)]).signs(KEY, 0)
    assert set(signs.unique().tolist()) == {-1.0, 1.0}
    assert abs(float(signs.mean())) < 4 / math.sqrt(len(signs))
    by_bit = signs.view(-1, 128).mean(0)  # each bit of the 128 of a counter
    assert float(by_bit.abs().max()) < 5 / math.sqrt(len(signs) / 128)


def test_two_names_with_one_identity_are_refused():
    with pytest.raises(ValueError, match="rename one of them"):
        NoiseField([("p15387", 1), ("p62768", 1)])


@pytest.mark.parametrize("drop", [0.1, 0.5, 0.0])
def test_dropout_drops_at_its_rate(drop):
    dropout_mask = dropout_mask_by_row("dropout/vision/1", torch.arange(64), 4096, drop, KEY, DROPOUT_STREAM)
    sigma = math.sqrt(drop * (1 - drop) / dropout_mask.numel())
    assert abs(float((~dropout_mask).double().mean()) - drop) <= 4 * sigma + 2**-17  # the rate is rounded to 2^-16


def test_the_mask_of_a_shorter_prompt_is_the_head_of_the_longer():
    rows, width = torch.arange(5), 8
    full = StepNoise(KEY, {"language": rows}).dropout_mask("language", 2, 77, width, 0.1)
    for tokens in (1, 9, 10, 76):
        short = StepNoise(KEY, {"language": rows}).dropout_mask("language", 2, tokens, width, 0.1)
        assert torch.equal(short, full[:, :tokens])


@pytest.mark.parametrize("place", [[3], [5, 3, 0], [0, 1, 2, 3, 4, 5, 6], [3, 2**24 - 1]])
def test_a_sample_sees_the_same_noise_wherever_it_sits(place):
    """Rank, micro-batch and order of the batch do not matter: only the position in the global batch does."""
    alone, among = StepNoise(KEY, {"vision": torch.tensor([3])}), StepNoise(KEY, {"vision": torch.tensor(place)})
    where = place.index(3)
    assert torch.equal(among.router("vision", 4, 2)[where], alone.router("vision", 4, 2)[0])
    assert torch.equal(among.dropout_mask("vision", 4, 197, 8, 0.1)[where], alone.dropout_mask("vision", 4, 197, 8, 0.1)[0])
    drawn, expected = (normals_by_row(["x"], torch.tensor(rows), 9, KEY, 2)[0] for rows in (place, [3]))
    assert torch.equal(drawn[where], expected[0])


def test_a_mask_too_large_for_one_chunk_is_the_same_row_by_row():
    rows, numel = torch.arange(7), 100_000
    whole = dropout_mask_by_row("dropout/vision/1", rows, numel, 0.1, KEY, DROPOUT_STREAM)
    assert torch.equal(
        whole, torch.cat([dropout_mask_by_row("dropout/vision/1", row[None], numel, 0.1, KEY, DROPOUT_STREAM) for row in rows])
    )


def test_samples_blocks_branches_and_purposes_have_noise_of_their_own():
    rows = torch.arange(2)
    noise = StepNoise(KEY, {"vision": rows, "language": rows})
    routers = [noise.router(branch, layer, 512) for branch in ("vision", "language") for layer in (1, 2)]
    drawn = torch.cat([*routers, (noise.dropout_mask("vision", 1, 64, 8, 0.5).flatten(1) * 2.0 - 1)])
    correlation = drawn @ drawn.T / 512
    assert float((correlation - torch.diag(correlation.diag())).abs().max()) < 4.5 / math.sqrt(512)  # 45 pairs


def test_routers_whose_noise_is_drawn_at_once_have_what_each_would_draw_alone():
    rows = {"vision": torch.tensor([5, 70_000]), "language": torch.arange(3)}
    at_once, alone = StepNoise(KEY, rows, {"vision": 12, "language": 2}), StepNoise(KEY, rows)
    for branch, layer in (("vision", 12), ("vision", 1), ("language", 2)):
        assert torch.equal(at_once.router(branch, layer, 3), alone.router(branch, layer, 3))


def test_every_evaluation_of_a_step_sees_one_realisation():
    noise = StepNoise(KEY, {"vision": torch.arange(4)})
    assert noise.router("vision", 1, 2) is noise.router("vision", 1, 2)
    first, again = (noise.dropout_mask("vision", 1, 5, 8, 0.1) for _ in range(2))
    assert first.data_ptr() == again.data_ptr()
