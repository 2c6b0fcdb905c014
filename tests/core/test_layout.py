import pytest
import torch
from safetensors.torch import save

from sealmark.core.errors import FormatError
from sealmark.core.layout import TensorInfo, parse_header
from sealmark.core.weights import MemoryWeights

TENSORS = {
    "b": torch.arange(6.0).reshape(2, 3),
    "a": torch.tensor([1, -2], dtype=torch.int64),
    "half": torch.tensor([0.5], dtype=torch.bfloat16),
    "none": torch.empty(0, 4),
}


def in_memory(data):
    return MemoryWeights(memoryview(bytearray(data)))


def shifted(data):
    """The same file with one space more in its header, so that no tensor is aligned."""
    length = int.from_bytes(data[:8], "little")
    return (length + 1).to_bytes(8, "little") + data[8 : 8 + length] + b" " + data[8 + length :]


@pytest.mark.parametrize("change", [bytes, shifted], ids=["aligned", "not aligned"])
def test_weights_in_memory_are_those_that_were_saved(change):
    weights = in_memory(change(save(TENSORS)))
    assert list(weights) == sorted(TENSORS)
    for name, tensor in TENSORS.items():
        assert weights[name].dtype == tensor.dtype
        assert torch.equal(weights[name], tensor)


def test_weights_in_memory_are_views_of_its_bytes():
    data = bytearray(save({"a": torch.zeros(2)}))
    weights = MemoryWeights(memoryview(data))
    data[-4:] = b"\x00\x00\x80\x3f"
    assert weights["a"].tolist() == [0.0, 1.0]


def test_a_tensor_that_is_not_in_memory_is_an_unknown_name():
    with pytest.raises(LookupError, match="no such tensor"):
        in_memory(save(TENSORS))["c"]


@pytest.mark.parametrize(
    "data",
    [b"", b"\x02\x00\x00", save(TENSORS)[:-1], save(TENSORS) + b"?", b"\xff" * 100],
    ids=["empty", "no header", "truncated", "oversized", "a huge header"],
)
def test_anything_else_in_memory_is_refused_by_name(data):
    with pytest.raises(FormatError, match="the weights"):
        in_memory(data)


def test_a_header_tells_where_each_tensor_lies():
    data = save({"a": torch.zeros(3)})
    header = parse_header(lambda start, end: data[start:end], len(data), "it")
    assert header.entries["a"].info == TensorInfo((3,), torch.float32)
    assert (header.entries["a"].start, header.entries["a"].end) == (0, 12)
    assert header.data_start + 12 == len(data)
