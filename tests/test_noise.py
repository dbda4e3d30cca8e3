"""Counter-based noise: published test vectors, the formula, and its statistics."""

import math

import pytest
import torch

from fastdit.noise import normal, philox4x32


# Known answers for philox4x32-10 from Random123 1.14, tests/kat_vectors.
@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (
            (0xFFFFFFFF,) * 4,
            (0xFFFFFFFF,) * 2,
            (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        ),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_philox_gives_the_published_words(counter, key, expected):
    packed = int.from_bytes(key[0].to_bytes(4, "little") + key[1].to_bytes(4, "little"), "little")
    signed = packed - 2**64 if packed >= 2**63 else packed
    words = philox4x32([torch.tensor([c]) for c in counter], torch.tensor([signed]))
    assert tuple(int(w) for w in words) == expected


def test_normal_is_its_stated_formula():
    """Computed element by element in Python floats from the generator's words."""
    seeds = torch.tensor([[2**40 + 5, 3], [0, 0]])
    steps = torch.tensor([0, 9])
    out = normal(seeds, steps, 7)
    assert out.shape == (2, 2, 7) and out.dtype == torch.float32
    for s, step in enumerate(steps.tolist()):
        for b, (key, stream) in enumerate(seeds.tolist()):
            for e in range(7):
                counter = [torch.tensor(c) for c in (e // 4, step, stream, 0)]
                words = [int(w) for w in philox4x32(counter, torch.tensor(key))]
                r0, r1 = words[:2] if e % 4 < 2 else words[2:]
                u = torch.tensor(r0, dtype=torch.float32).item() / 2**32 + 2**-33
                v = (r1 - 2**32 if r1 >= 2**31 else r1) / 2**31
                wave = math.cos if e % 2 == 0 else math.sin
                expected = math.sqrt(-2 * math.log(u)) * wave(math.pi * v)
                assert out[s, b, e].item() == pytest.approx(expected, rel=1e-5, abs=2e-6)


def test_normal_has_the_moments_and_tails_of_a_normal():
    z = normal(torch.tensor([[7, i] for i in range(64)]), torch.arange(8), 4096).double()
    n = z.numel()  # 2,097,152; the bounds below are five standard errors
    assert abs(z.mean()) < 5 / n**0.5
    assert abs(z.var() - 1) < 5 * (2 / n) ** 0.5
    assert abs((z**3).mean()) < 5 * (15 / n) ** 0.5
    assert abs((z**4).mean() - 3) < 5 * (96 / n) ** 0.5
    for threshold in (1.0, 2.0, 3.0, 4.0):
        share = math.erfc(threshold / 2**0.5)
        assert abs((z.abs() > threshold).double().mean() - share) < 5 * (share / n) ** 0.5


def test_neighbours_are_uncorrelated():
    z = normal(torch.tensor([[7, i] for i in range(32)]), torch.arange(32), 1024).double()
    bound = 5 / z.numel() ** 0.5
    assert abs((z[1:] * z[:-1]).mean()) < bound  # steps
    assert abs((z[:, 1:] * z[:, :-1]).mean()) < bound  # streams
    for lag in (1, 2, 3, 4):
        assert abs((z[..., lag:] * z[..., :-lag]).mean()) < bound  # elements


def test_an_image_does_not_depend_on_its_batch():
    seeds = torch.tensor([[9, i] for i in range(40)])
    all_of_them = normal(seeds, torch.arange(100), 769)  # several blocks
    for s, b in ((0, 0), (57, 13), (99, 39)):
        alone = normal(seeds[b : b + 1], torch.tensor([s]), 769)
        assert torch.equal(alone[0, 0], all_of_them[s, b])
    fewer = normal(seeds, torch.tensor([3]), 5)
    assert torch.equal(fewer[0], all_of_them[3, :, :5])


@pytest.mark.parametrize("change", ["key", "high-key", "stream", "step"])
def test_every_part_of_the_seed_matters(change):
    base = normal(torch.tensor([[5, 6]]), torch.tensor([7]), 64)
    other = {
        "key": ([[4, 6]], [7]),
        "high-key": ([[5 + 2**32, 6]], [7]),
        "stream": ([[5, 7]], [7]),
        "step": ([[5, 6]], [8]),
    }[change]
    changed = normal(torch.tensor(other[0]), torch.tensor(other[1]), 64)
    assert (base != changed).float().mean() > 0.9


def test_compiled_noise_is_the_same_noise():
    """Inductor must not narrow the integers, as it does if counters come from a bare arange."""
    keys, steps = torch.tensor([[7, 0], [2**40 + 3, 5], [7, 2]]), torch.tensor([1])
    torch.compiler.reset()
    compiled = torch.compile(normal, fullgraph=True)
    assert (compiled(keys, steps, 770) - normal(keys, steps, 770)).abs().max() < 2e-6
