"""Published weights: every key used, every parameter filled, no code run, the network that they were trained in."""

import os

import pytest
import torch
from monai.networks.nets import ResNetFeatures
from torch.nn import functional as F

from latdiff3d.errors import InputError
from latdiff3d.pretrained import SOURCES, network_from_weights


class Code:
    """What a pickle runs when it is read."""

    def __reduce__(self):
        return os.mkdir, ("gotcha",)


@pytest.fixture(scope="module")
def resnet10():
    """A state dict of MedicalNet's names, its batch norms far from the identity."""
    torch.manual_seed(0)
    weights = ResNetFeatures("resnet10", False, 3, 1).state_dict()
    for key, value in weights.items():
        if key.endswith("running_mean"):
            value.uniform_(-0.2, 0.2)
        elif key.endswith("running_var"):
            value.uniform_(0.5, 1.5)
    return weights


@pytest.fixture
def saved(tmp_path):
    def save(content):
        torch.save(content, tmp_path / "weights.pth")
        return tmp_path / "weights.pth"

    return save


def medicalnet(weights, x):
    """MedicalNet's features by its paper's table: strides 2, 2 (pool), 1, 2, and layers 3 and 4 dilated by 2 and 4."""

    def conv(x, name, norm, stride=1, dilation=1):
        kernel = weights[f"{name}.weight"]
        x = F.conv3d(x, kernel, None, stride, dilation * (kernel.shape[-1] // 2), dilation)
        of = [weights[f"{norm}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")]
        return F.batch_norm(x, *of)

    features = [F.relu(conv(x, "conv1", "bn1", stride=2))]
    x = F.max_pool3d(features[0], 3, 2, 1)
    for layer, stride, dilation in (("layer1.0", 1, 1), ("layer2.0", 2, 1), ("layer3.0", 1, 2), ("layer4.0", 1, 4)):
        out = F.relu(conv(x, f"{layer}.conv1", f"{layer}.bn1", stride, dilation))
        out = conv(out, f"{layer}.conv2", f"{layer}.bn2", 1, dilation)
        if f"{layer}.downsample.0.weight" in weights:
            x = conv(x, f"{layer}.downsample.0", f"{layer}.downsample.1", stride)
        x = F.relu(out + x)
        features.append(x)
    return features


# MedicalNet


def test_medicalnets_weights_give_medicalnets_features(resnet10, saved):
    path = saved({"state_dict": {f"module.{key}": value for key, value in resnet10.items()}})
    network = network_from_weights(path, "medicalnet_resnet10").eval()
    x = torch.randn(1, 1, 40, 24, 48)  # 5 × 3 × 6 at the end, so that a dilation of 4 reaches a neighbour
    with torch.no_grad():
        for found, expected in zip(network(x), medicalnet(resnet10, x), strict=True):
            assert expected.std() > 0.1
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_prefix_and_batch_norms_counters_make_no_difference(resnet10, saved):
    bare = {key: value for key, value in resnet10.items() if not key.endswith("num_batches_tracked")}
    for content in (bare, {"state_dict": bare}, {f"module.{key}": value for key, value in resnet10.items()}):
        network = network_from_weights(saved(content), "medicalnet_resnet10")
        found = network.state_dict()
        assert all(torch.equal(found[key], value) for key, value in bare.items())


def test_the_gradient_passes_the_padded_shortcut(saved):
    """With only shortcuts left, the features are the stem's, and a change of them must come back."""
    weights = ResNetFeatures("resnet18", False, 3, 1).state_dict()
    for key, value in weights.items():
        if key.startswith("layer") and ".bn2." in key:
            value.zero_()
    network = network_from_weights(saved(weights), "medicalnet_resnet18").eval()
    x = torch.randn(1, 1, 16, 16, 16, requires_grad=True)
    network(x)[-1].sum().backward()
    assert x.grad.any()


# The 2D networks


@pytest.fixture(scope="module")
def resnet50():
    torch.manual_seed(1)
    return ResNetFeatures("resnet50", False, 2, 3).state_dict()


def test_torchvisions_names_and_its_classifier_fit(resnet50, saved):
    path = saved(resnet50 | {"fc.weight": torch.zeros(1000, 2048), "fc.bias": torch.zeros(1000)})
    found = network_from_weights(path, "imagenet_resnet50").state_dict()
    assert all(torch.equal(found[key], value) for key, value in resnet50.items() if "tracked" not in key)


def test_radimagenets_numbered_names_fit(resnet50, saved):
    places = {"conv1": 0, "bn1": 1, "layer1": 4, "layer2": 5, "layer3": 6, "layer4": 7}
    numbered = {f"backbone.{places[key.split('.')[0]]}.{key.split('.', 1)[1]}": v for key, v in resnet50.items()}
    found = network_from_weights(saved(numbered), "radimagenet_resnet50").state_dict()
    assert all(torch.equal(found[key], value) for key, value in resnet50.items() if "tracked" not in key)


def test_keras_biases_are_used_and_its_strides_come_first(resnet50, saved):
    """A bias that the batch norm behind it subtracts again changes nothing."""
    without, with_bias = dict(resnet50), dict(resnet50)
    for key in [key for key in resnet50 if key.endswith("running_mean")]:
        norm = key.removesuffix(".running_mean")
        conv = norm.replace("bn", "conv").replace("downsample.1", "downsample.0")
        bias = torch.rand_like(resnet50[key])
        without[f"{conv}.bias"] = torch.zeros_like(bias)
        with_bias |= {f"{conv}.bias": bias, key: resnet50[key] + bias}
    x, features = torch.rand(1, 3, 40, 48), []
    for weights in (without, with_bias):
        network = network_from_weights(saved(weights), "radimagenet_resnet50_keras").eval()
        with torch.no_grad():
            features.append(network(x)[-1])
    torch.testing.assert_close(features[1], features[0], rtol=1e-3, atol=1e-3)
    assert network.layer3[0].conv1.stride == (2, 2) and network.layer3[0].conv2.stride == (1, 1)
    assert network.bn1.eps == 1.001e-5


def test_keras_weights_are_refused_by_torchvisions_network(resnet50, saved):
    with pytest.raises(InputError, match=r"also has conv1\.bias \(1\)"):
        network_from_weights(saved(resnet50 | {"conv1.bias": torch.zeros(64)}), "radimagenet_resnet50")


# What is refused


def test_a_missing_key_is_named(resnet10, saved):
    weights = {key: value for key, value in resnet10.items() if key != "layer2.0.conv1.weight"}
    with pytest.raises(InputError, match=r"it lacks layer2\.0\.conv1\.weight \(1\)\. Expected resnet_10_23dataset"):
        network_from_weights(saved(weights), "medicalnet_resnet10")


def test_an_extra_key_is_named(resnet10, saved):
    with pytest.raises(InputError, match=r"it also has conv_seg\.weight \(1\)\."):
        network_from_weights(saved(resnet10 | {"conv_seg.weight": torch.zeros(1)}), "medicalnet_resnet10")


def test_another_shape_is_named(resnet10, saved):
    with pytest.raises(InputError, match=r"it has another shape of conv1\.weight \(1\)\."):
        network_from_weights(saved(resnet10 | {"conv1.weight": torch.zeros(64, 3, 7, 7, 7)}), "medicalnet_resnet10")


def test_weights_of_another_network_are_refused_in_one_line(resnet50, saved):
    with pytest.raises(InputError, match="does not fit medicalnet_resnet10") as refused:
        network_from_weights(saved(resnet50), "medicalnet_resnet10")
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 500


@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_a_pickle_is_refused_and_not_run(tmp_path, monkeypatch, legacy):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": Code()}, "weights.pth", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(InputError, match=r"^weights\.pth is not read as weights \(it would run code, \S*mkdir\); get"):
        network_from_weights("weights.pth", "medicalnet_resnet10")
    assert not (tmp_path / "gotcha").exists()


@pytest.mark.parametrize("content", [b"", b"not weights", b"PK\x03\x04 cut short"])
def test_a_damaged_file_is_refused_in_one_line(tmp_path, content):
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"is not read as weights \(.+\); get resnet_10_23dataset") as refused:
        network_from_weights(path, "medicalnet_resnet10")
    assert "\n" not in str(refused.value)


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match="is not read as weights"):
        network_from_weights(tmp_path, "medicalnet_resnet10")


@pytest.mark.parametrize("content", [torch.zeros(3), [1, 2], {"epoch": 3}, {"state_dict": {"weight": 1}}])
def test_a_file_without_a_state_dict_is_refused(saved, content):
    with pytest.raises(InputError, match="holds no state dict of tensors"):
        network_from_weights(saved(content), "medicalnet_resnet10")


@pytest.mark.parametrize("architecture", SOURCES)
def test_a_missing_file_is_named_with_what_to_get(tmp_path, architecture):
    path = tmp_path / "weights.pth"
    with pytest.raises(InputError) as refused:
        network_from_weights(path, architecture)
    assert str(refused.value) == f"there is no file {path}; get {SOURCES[architecture]} and put it there."


def test_another_architecture_is_refused(tmp_path):
    with pytest.raises(InputError, match="expected one of medicalnet_resnet10, "):
        network_from_weights(tmp_path / "weights.pth", "resnet10")
