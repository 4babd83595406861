"""torch.compile takes the whole model as one graph, and torch.export takes it out of Python.

Blocks compiled one by one, as training does: tests/model/test_modeling.py and
tests/test_compilation.py.
"""

import pytest
import torch
from torch import nn
from transformers import CompileConfig

from .models import PRESETS, make, prompt

GREEDY = {"max_new_tokens": 5, "do_sample": False}


# Seconds each, for graphs that hold nothing that the others do not.
SIMILAR = ["qkv_norm", "qk_fc_norm"]


@pytest.fixture(autouse=True)
def _fresh_compiler():
    yield
    torch.compiler.reset()


def _block(preset: str):
    """A model of one block, whose graph is compiled in half the time."""
    return make(preset, num_hidden_layers=1)


@pytest.mark.parametrize("preset", PRESETS)
def test_the_forward_pass_is_one_graph(preset: str) -> None:
    model = _block(preset)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        expected = model(prompt()).logits
        torch.testing.assert_close(compiled(prompt()).logits, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("preset", [name for name in PRESETS if name != "sigma_reparam"])
def test_the_training_step_is_one_graph(preset: str) -> None:
    losses, gradients = [], []
    for compiles in (False, True):
        model = _block(preset).train()
        step = torch.compile(model, fullgraph=True, backend="aot_eager") if compiles else model
        losses.append(step(prompt(), labels=prompt()).loss)
        losses[-1].backward()
        gradients.append([each.grad for each in model.parameters()])
    torch.testing.assert_close(losses[1], losses[0])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-3)


def test_sigma_reparam_trains_in_more_than_one_graph_and_says_why() -> None:
    with pytest.raises(torch._dynamo.exc.Unsupported, match="sigma_reparam=True follows"):
        whole = torch.compile(_block("sigma_reparam").train(), fullgraph=True, backend="aot_eager")
        whole(prompt(), labels=prompt())
    models = [_block("sigma_reparam").train() for _ in range(2)]
    for model, step in (
        (models[0], models[0]),
        (models[1], torch.compile(models[1], backend="aot_eager")),
    ):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
        for _ in range(3):
            optimizer.zero_grad()
            step(prompt(), labels=prompt()).loss.backward()
            optimizer.step()
    for (name, one), other in zip(
        models[0].state_dict().items(), models[1].state_dict().values(), strict=True
    ):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("preset", PRESETS)
def test_generate_compiles_its_decoding(preset: str) -> None:
    """Transformers compiles by itself on accelerators only, so that it is told to here."""
    model = _block(preset)
    expected = model.generate(prompt(), **GREEDY)
    graphs = []

    def count(graph: torch.fx.GraphModule, _: object):
        graphs.append(graph)
        return graph.forward

    config = CompileConfig(fullgraph=True, backend=count, mode=None)
    config._compile_all_devices = True
    generated = model.generate(
        prompt(), cache_implementation="static", compile_config=config, **GREEDY
    )
    assert torch.equal(generated, expected)
    assert len(graphs) == 1


@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS)
def test_inductor_computes_the_same(preset: str) -> None:
    model = make(preset)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True)
        torch.testing.assert_close(
            compiled(prompt()).logits, model(prompt()).logits, atol=1e-4, rtol=1e-4
        )


class _Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids, attention_mask=attention_mask, use_cache=False).logits


@pytest.mark.parametrize(
    "preset",
    [
        pytest.param(preset, marks=[pytest.mark.slow] if preset in SIMILAR else [])
        for preset in PRESETS
    ],
)
def test_the_exported_program_computes_the_same_at_any_size(preset: str, tmp_path) -> None:
    model = _block(preset)
    batch, length = torch.export.Dim("batch", max=8), torch.export.Dim("length", min=2, max=64)
    program = torch.export.export(
        _Logits(model),
        (prompt(2, 5), torch.ones(2, 5, dtype=torch.long)),
        dynamic_shapes=({0: batch, 1: length}, {0: batch, 1: length}),
        strict=False,
    )
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    for shape in ((2, 5), (3, 9), (1, 2)):
        ids = prompt(*shape)
        mask = torch.ones_like(ids)
        mask[0, : shape[1] // 3] = 0
        with torch.no_grad():
            expected = model(ids, attention_mask=mask).logits
        kept = mask.bool()
        torch.testing.assert_close(loaded(ids, mask)[kept], expected[kept], atol=1e-5, rtol=1e-4)
