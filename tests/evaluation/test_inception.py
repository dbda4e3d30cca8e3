"""Inception against torch-fidelity's, and what is said where its weights are missing."""

import io
import math
import urllib.error
import urllib.request

import numpy as np
import pytest
import torch

from fastdit.evaluation import load_inception
from fastdit.evaluation.inception import WEIGHTS_FILE, WEIGHTS_URL, Inception, resize


def random_weights():
    """Return weights of every layer under which no feature vanishes."""
    generator = torch.Generator().manual_seed(0)
    weights = {}
    with torch.device("meta"):
        shapes = {name: t.shape for name, t in Inception().state_dict().items()}
    for name, shape in shapes.items():
        if name.endswith("num_batches_tracked"):
            continue
        z = torch.randn(shape, generator=generator)
        if len(shape) > 1:
            weights[name] = z * math.sqrt(2 / shape[1:].numel())
        elif name.endswith(("running_var", "bn.weight")):
            weights[name] = 1 + 0.2 * z.clamp(-2, 2)
        else:
            weights[name] = 0.2 * z
    return weights


@pytest.fixture(scope="module")
def weights_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / WEIGHTS_FILE
    torch.save(random_weights(), path)
    return path


def images(*shape):
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    return torch.from_numpy(pixels)


# Features of torch-fidelity 0.4.0 with `random_weights()` for `images(2, 3, 24, 20)`.
PUBLISHED = {
    "pool": [
        [1.61384e-05, 0.0441827, 0.753689, 1.08337, 0.120785, 0.502429],
        [0, 0.0436969, 0.722687, 1.11357, 0.101745, 0.436917],
    ],
    "spatial": [
        [1.34691, 2.99304, 0, 0, 0, 0],
        [1.39302, 2.77971, 0, 0.140898, 0, 0],
    ],
    "logits": [
        [0.680209, -3.05309, -0.59777],
        [0.727438, -2.89569, -0.647201],
    ],
}


def test_the_features_are_those_that_torch_fidelity_computed(weights_file):
    network = load_inception(weights_file)
    features = network(images(2, 3, 24, 20))
    assert [t.shape[1] for t in features] == [2048, 2023, 1008]
    for name, published in PUBLISHED.items():
        found = getattr(features, name)
        assert torch.allclose(found[:, ::400], torch.tensor(published), rtol=1e-3, atol=1e-3), name


def test_the_features_are_torch_fidelitys(weights_file):
    try:
        from torch_fidelity import FeatureExtractorInceptionV3
    except (ImportError, RuntimeError) as error:  # RuntimeError from torchvision of another build
        pytest.skip(f"torch-fidelity cannot be imported: {error}")
    theirs = FeatureExtractorInceptionV3(
        "theirs", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(weights_file)
    )
    kept = []
    theirs.Mixed_6d.register_forward_hook(lambda module, inputs, output: kept.append(output))
    batch = images(2, 3, 30, 41)
    pool, logits = theirs(batch)
    spatial = kept[0][:, :7].permute(0, 2, 3, 1).flatten(1)
    for found, expected in zip(
        load_inception(weights_file)(batch), (pool, spatial, logits), strict=True
    ):
        assert (found - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("size", [2, 5, 11])
def test_pixels_are_resized_as_tensorflow_did(size):
    """The formula for one pixel: its place is `i * H / size`, and the last pixel is repeated."""
    image = torch.rand(2, 1, 5, 7)
    found = resize(image, size)
    for i in range(size):
        for j in range(size):
            y, x = i * 5 / size, j * 7 / size
            top, left = math.floor(y), math.floor(x)
            bottom, right = min(top + 1, 4), min(left + 1, 6)
            corners = image[..., [top, bottom], :][..., [left, right]]
            across = torch.tensor([1 - (x - left), x - left])
            expected = torch.tensor([1 - (y - top), y - top]) @ (corners @ across)[..., None]
            assert torch.allclose(found[..., i, j], expected.squeeze(-1), atol=1e-5)


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    return tmp_path / "hub" / "checkpoints" / WEIGHTS_FILE


class Answer(io.BytesIO):
    def __init__(self, content, length=None):
        super().__init__(content)
        self.headers = {"Content-Length": str(len(content) if length is None else length)}


def test_without_a_network_one_sentence_says_what_to_download(empty_cache, monkeypatch):
    def refuse(url, timeout):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    with pytest.raises(ValueError, match="could not be downloaded .*no route to host") as caught:
        load_inception()
    assert f"download {WEIGHTS_URL} to {empty_cache}, or name the file" in str(caught.value)


def test_a_download_that_ends_early_is_not_kept(empty_cache, monkeypatch):
    monkeypatch.setattr(urllib.request, "urlopen", lambda url, timeout: Answer(b"part", 100))
    with pytest.raises(ValueError, match="the connection ended early"):
        load_inception()
    assert not any(p.is_file() for p in empty_cache.parent.rglob("*"))


def test_a_download_is_kept_where_torch_fidelity_looks(empty_cache, monkeypatch):
    monkeypatch.setattr(urllib.request, "urlopen", lambda url, timeout: Answer(b"no weights"))
    for _ in range(2):  # the second call reads the file
        with pytest.raises(ValueError, match="expected a PyTorch file of tensors"):
            load_inception()
        assert empty_cache.read_bytes() == b"no weights"
        monkeypatch.delattr(urllib.request, "urlopen", raising=False)


def test_other_weights_are_refused(tmp_path):
    path = tmp_path / "w.pth"
    with pytest.raises(ValueError, match="w.pth: no such file; it is https://"):
        load_inception(path)
    path.write_bytes(b"no weights")
    with pytest.raises(ValueError, match="w.pth: expected a PyTorch file of tensors"):
        load_inception(path)
    torch.save({"Conv2d_1a_3x3.conv.weight": torch.zeros(())}, path)
    with pytest.raises(ValueError, match=r"conv.weight has shape \[32, 3, 3, 3\], got shape \[\]"):
        load_inception(path)
    torch.save({"fc.weight": torch.zeros(1008, 2048)}, path)
    with pytest.raises(ValueError, match=r"conv.weight has shape \[32, 3, 3, 3\], got none"):
        load_inception(path)
