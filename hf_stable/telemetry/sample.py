"""One sampled step: from hooks to numbers."""

import types
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from hf_stable.model.functional_stable_gpt import statistics_dtype

from .attention import replace_attention
from .bounds import PREFIX, Bounds, bound_numbers
from .gauges import Gauges
from .head import HeadGauge, head_numbers
from .hooks import Undo, give_attributes, hook_attention, hook_linear, hook_output, hook_stream
from .names import Numbers
from .numbers import attention_numbers, stream_numbers, tensor_numbers
from .sites import find_sites
from .weights import Weights, adam_eps, gain_maxima, gain_sums

_BRANCHES = ("attention", "mlp")
_CLIPS = ("attention_clip_gamma", "attention_clip_alpha")


class Subject:
    """A watched model, with the state that is kept between samples."""

    def __init__(self, model: Any, optimizer: torch.optim.Optimizer | None) -> None:
        self.model, self.optimizer = model, optimizer
        self.sites = find_sites(model)
        self.weights = Weights(self.sites)
        self.bounds = Bounds(self.sites)
        config = model.config.get_text_config(decoder=True)
        self.width: int = config.hidden_size
        fields = config.to_dict()
        self.heads: int = config.num_attention_heads
        self.key_heads: int = fields.get("num_key_value_heads") or self.heads
        self.cap: float | None = fields.get("attn_logit_softcapping")
        self.final_cap: float | None = fields.get("final_logit_softcapping")
        self.has_z_loss = bool(fields.get("z_loss"))
        self.clips = any(fields.get(field) is not None for field in _CLIPS)
        self._watched: dict[nn.Module, Callable[..., Any]] = {}

    def watched(self, block: nn.Module) -> Callable[..., Any]:
        """Return the function for a compiled block to call, with hooks compiled in.

        It is the block's forward if FSDP has hooks on it, which a graph must not contain, else its
        whole call. The graph without our hooks is kept.
        """
        if block not in self._watched:
            function = _watched_forward if isinstance(block, FSDPModule) else _watched_call
            call = types.MethodType(function, block)
            self._watched[block] = torch.compile(call, fullgraph=True, dynamic=False)
        return self._watched[block]


# These functions have separate code objects. Otherwise dynamo would reuse the graph without hooks,
# because it does not check for new hooks.


def _watched_call(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return block._call_impl(*args, **kwargs)


def _watched_forward(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return type(block).forward(block, *args, **kwargs)


class Sample:
    """Hooks of a sampled step, active from construction to `remove` or `end`."""

    def __init__(self, subject: Subject, with_bounds: bool) -> None:
        if "watched_output" in vars(subject.sites.embedding):
            raise ValueError(
                f"This {type(subject.model).__name__} is already watched: exit that `watch` first."
            )
        self._subject = subject
        parameter = next(subject.model.parameters())
        self._dtype = statistics_dtype(parameter)
        self._gauges = Gauges(parameter.device)
        self._head = HeadGauge(subject.sites.head, self._gauges, subject.final_cap)
        self._bounded = {layer.index for layer in subject.bounds.layers} if with_bounds else set()
        self._prefixes: dict[int, torch.Tensor] = {}
        self._sums: dict[str, torch.Tensor] = {}
        self._maxima: dict[str, torch.Tensor] = {}
        self._has_looked = False
        self._undos: list[Undo] = []
        self._hook_model()
        self._hook_places()
        self._hook_optimizer()
        self._switch_compiled_blocks()

    def remove(self) -> None:
        """Remove all hooks and restore the model."""
        while self._undos:
            self._undos.pop()()

    def look_at_gradients(self) -> None:
        """Measure weights, bounds and gradients now; only the first call in a step does so."""
        if not self._has_looked:
            self._has_looked = True
            sites = self._subject.sites
            self._sums.update({**self._subject.weights.look(), **gain_sums(sites)})
            self._maxima.update(gain_maxima(sites))
            if self._prefixes:
                self._sums.update(self._subject.bounds.look(self._prefixes))

    def end(self) -> Numbers:
        """Remove the hooks and return the numbers of the step; collective."""
        self.remove()
        self.look_at_gradients()
        reduced = self._gauges.reduce(self._sums, self._maxima)
        subject, eps = self._subject, adam_eps(self._subject.optimizer)
        numbers: Numbers = {}
        for layer in subject.sites.layers:
            numbers.update(stream_numbers(reduced, f"{layer.place}.stream", _BRANCHES))
            place = f"{layer.place}.attention"
            numbers.update(attention_numbers(reduced, place, subject.cap, subject.clips))
            for place in layer.linears:
                numbers.update(tensor_numbers(reduced, place))
                if f"{place}/gain" in reduced:
                    numbers[f"{place}/gain"] = reduced[f"{place}/gain"][0]
        numbers.update(tensor_numbers(reduced, "embed"))
        numbers.update(tensor_numbers(reduced, "head"))
        numbers.update(stream_numbers(reduced, "stream", ("final",)))
        numbers.update(head_numbers(reduced, subject.has_z_loss))
        numbers.update(subject.weights.numbers(reduced, eps))
        numbers.update(bound_numbers(reduced, subject.bounds.layers))
        return numbers

    def _hook_model(self) -> None:
        def before(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if model.training:
                self._gauges.forget()
                self._head.forget()
                self._make_prefixes(args, kwargs)

        def after(model: Any, args: Any, output: Any) -> None:
            if model.training:
                self._gauges.keep()
                for layer in self._subject.sites.layers:
                    if layer.index in self._bounded:
                        self._prefixes[layer.index] = vars(layer.module)["watched_prefix"]

        model, head = self._subject.model, self._subject.sites.head
        # Read for each sample, because `set_attn_implementation` may have changed it.
        backend = model.config.get_text_config(decoder=True)._attn_implementation
        self._undos += [
            model.register_forward_pre_hook(before, with_kwargs=True).remove,
            model.register_forward_hook(after).remove,
            head.register_forward_pre_hook(self._head.before).remove,
            head.register_forward_hook(self._head.after, always_call=True).remove,
            replace_attention(backend),
        ]

    def _make_prefixes(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Allocate tensors for the first tokens of the stream that enters each bounded block."""
        if not self._bounded:
            return
        given = [*args, kwargs.get("input_ids"), kwargs.get("inputs_embeds")]
        tokens = next(each for each in given if each is not None)
        shape = (1, min(PREFIX, tokens.shape[1]), self._subject.width)
        for layer in self._subject.sites.layers:
            if layer.index in self._bounded:
                prefix = torch.zeros(shape, dtype=self._dtype, device=tokens.device)
                vars(layer.module)["watched_prefix"] = prefix

    def _hook_places(self) -> None:
        subject, gauges = self._subject, self._gauges
        sites = subject.sites
        for layer in sites.layers:
            self._undos += hook_stream(layer.module, f"{layer.place}.stream/attention", gauges)
            if layer.mlp_reader is not None:
                place = f"{layer.place}.stream/mlp"
                self._undos += hook_stream(layer.mlp_reader, place, gauges)
            for place, linear in layer.linears.items():
                self._undos += hook_linear(linear, place, gauges)
            self._undos += hook_attention(layer, subject.heads, subject.key_heads, gauges)
        if sites.final is not None:
            self._undos += hook_stream(sites.final, "stream/final", gauges)
        self._undos += hook_output(sites.embedding, "embed", gauges)

    def _hook_optimizer(self) -> None:
        optimizer, weights = self._subject.optimizer, self._subject.weights
        if optimizer is None:
            return

        def before(*_: Any) -> None:
            self.look_at_gradients()
            self._sums.update(weights.look_at_used_gradients())
            weights.remember()

        def after(*_: Any) -> None:
            self._sums.update(weights.look_at_updates(optimizer))

        self._undos += [
            optimizer.register_step_pre_hook(before).remove,
            optimizer.register_step_post_hook(after).remove,
        ]

    def _switch_compiled_blocks(self) -> None:
        for block in self._subject.model.modules():
            plain = block._compiled_call_impl
            if plain is None:
                continue
            self._undos.append(partial(setattr, block, "_compiled_call_impl", plain))
            watched = self._subject.watched(block)
            if isinstance(block, FSDPModule):
                block._compiled_call_impl = None  # pyright: ignore
                self._undos.append(give_attributes(block, forward=watched))  # pyright: ignore
            else:
                block._compiled_call_impl = watched
