"""What telemetry must say, by the definitions: plain autograd in float64, nothing of `telemetry`.

Everything that passes is kept; attention is a full (S, S) softmax, the loss comes from all logits,
AdamW is written out, spectral norms are singular values and Jacobians are whole matrices.

Shape letters: B batch, H query heads, G key heads, S tokens, D head width.
"""

import contextlib
import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import nn

EDGES = (0.01, 0.03, 0.1, 0.3, 0.5, 0.7, 0.9)
Batch = dict[str, Any]


@dataclass(frozen=True)
class Adam:
    """Settings of AdamW, by torch's names."""

    lr: float = 1e-2
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-6
    weight_decay: float = 0.1

    def build(self, model: nn.Module) -> torch.optim.AdamW:
        """torch's optimizer of these settings."""
        return torch.optim.AdamW(model.parameters(), **vars(self))


@dataclass(frozen=True)
class Family:
    """Where a model family keeps what is measured; paths in the model, or in a block.

    Attributes:
        mlp_reader: the module of a block whose input is the stream that the MLP reads.
        spied: the module and name of the function that computes attention eagerly.
        gain_origin: what its norms add to their weights.
        windows: how many keys a query sees, itself included, by layer.
    """

    linears: dict[str, str]
    blocks: str = "model.layers"
    embedding: str = "model.embed_tokens"
    final: str = "model.norm"
    attention: str = "self_attn"
    mlp_reader: str = "post_attention_layernorm"
    spied: tuple[str, str] = ("", "eager_attention_forward")
    gain_origin: float = 0.0
    windows: dict[int, int] = field(default_factory=dict)


STABLE = Family(
    {
        "qkv": "self_attn.qkv_proj",
        "proj": "self_attn.o_proj",
        "fc1": "mlp.up_proj",
        "fc2": "mlp.down_proj",
    },
    mlp_reader="pre_feedforward_layernorm",
    spied=("hf_stable.model.blocks_stable_gpt", "attention_forward"),
)


def visible_keys(batch: Batch) -> torch.Tensor:
    """(B, S, S) bool by the definition: no later key, no padding, no other document."""
    ids = batch["input_ids"]
    size, length = ids.shape
    places = torch.arange(length)
    visible = (places[None, :] <= places[:, None]).repeat(size, 1, 1)
    mask = batch.get("attention_mask")
    if mask is not None and mask.ndim == 4:
        return mask[:, 0].expand(size, -1, -1)
    if mask is not None:
        visible &= mask.bool()[:, None, :]
    if "position_ids" in batch:
        document = (batch["position_ids"] == 0).cumsum(-1).expand(size, length)
        visible &= document[:, :, None] == document[:, None, :]
    if "cu_seq_lens_q" in batch:
        document = (places[:, None] >= batch["cu_seq_lens_q"][None, :]).sum(-1)
        visible &= document[:, None] == document[None, :]
    return visible


def map_of(linear: nn.Module) -> torch.Tensor:
    """(out, in) matrix that a linear module multiplies by, sigma-Reparam written out."""
    weight = linear.weight.detach()
    if type(linear).__name__ == "Conv1D":
        return weight.T
    if type(linear).__name__ != "StableGPTSigmaLinear":
        return weight
    sigma = linear.u @ weight @ linear.v / (linear.u.norm() * linear.v.norm())
    return weight * linear.gain.detach() / sigma


def turn(heads: torch.Tensor, positions: torch.Tensor, theta: float) -> torch.Tensor:
    """RoPE as multiplication of complex numbers: (B, H, S, D), positions (B or 1, S)."""
    half = heads.shape[-1] // 2
    rates = theta ** -(torch.arange(half, dtype=heads.dtype) / half)
    angles = positions[:, None, :, None].to(heads.dtype) * rates
    turned = torch.complex(heads[..., :half], heads[..., half:]) * torch.polar(
        torch.ones_like(angles), angles
    )
    return torch.cat((turned.real, turned.imag), dim=-1)


def split(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """(B, S, H * D) to (B, H, S, D)."""
    return tensor.reshape(*tensor.shape[:2], heads, -1).transpose(1, 2)


def scores_of(query: torch.Tensor, key: torch.Tensor, scaling: float) -> torch.Tensor:
    """(B, H, S, S), every key head for its group of queries."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    return torch.einsum("bhqd,bhkd->bhqk", query, key) * scaling


def probabilities(
    scores: torch.Tensor, visible: torch.Tensor, cap: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax after the cap, 0 where hidden, and the capped scores."""
    capped = scores if cap is None else cap * torch.tanh(scores / cap)
    shut = capped.masked_fill(~visible[:, None], -math.inf)
    return shut.softmax(-1).nan_to_num(0.0), capped


def stretch(probs: torch.Tensor, visible: torch.Tensor, clip: dict[str, Any]) -> torch.Tensor:
    """The clipped softmax before it is cut to [0, 1]."""
    lower: Any = clip["gamma"] or 0.0
    if clip["alpha"] is not None:
        lower = -clip["alpha"] / visible.sum(-1)[:, None, :, None].clamp(min=1)
    return (clip["zeta"] - lower) * probs + lower


def _norm(tensors: list[torch.Tensor]) -> float:
    return math.sqrt(sum(tensor.double().square().sum().item() for tensor in tensors))


def _rms(tensors: list[torch.Tensor]) -> float:
    return _norm(tensors) / math.sqrt(sum(tensor.numel() for tensor in tensors))


def _head_norms(heads: list[torch.Tensor]) -> list[float]:
    """Root mean square over tokens of each head's norm, of (B, H, S, D) tensors."""
    norms = torch.cat([tensor.norm(dim=-1).transpose(1, 2).flatten(0, 1) for tensor in heads])
    return norms.square().mean(0).sqrt().tolist()


class Reference:
    """Steps of AdamW on a float64 model of a family, each with all numbers of it."""

    def __init__(self, model: Any, adam: Adam, family: Family = STABLE) -> None:
        self.model, self.adam, self.family = model, adam, family
        self.config = model.config
        self.parameters = dict(model.named_parameters())
        self.moments = {name: (0 * p.data, 0 * p.data) for name, p in self.parameters.items()}
        self.steps = 0
        self.seen: dict[str, list[tuple[Any, Any]]] = defaultdict(list)
        self.attended: dict[int, list[tuple[torch.Tensor, torch.Tensor, Any]]] = defaultdict(list)
        self.logits: list[torch.Tensor] = []
        self.log_z: list[torch.Tensor] = []
        self.z_loss = 0.0
        self.batches: list[Batch] = []

    # one step ---------------------------------------------------------------------------------

    def step(self, batches: list[Batch], with_bounds: bool = True) -> dict[str, Any]:
        """Forward and backward of all microbatches, all numbers, and the update."""
        self.seen.clear()
        self.attended.clear()
        self.logits, self.log_z, self.z_loss = [], [], 0.0
        self.batches = batches
        self.model.zero_grad()
        with self._recording():
            for batch in batches:
                self._loss(batch).backward()
        numbers = self._linears() | self._streams() | self._head() | self._weights()
        for index in range(len(self.model.get_submodule(self.family.blocks))):
            numbers |= self._attention(index)
            if with_bounds and self.family is STABLE:
                numbers |= self._bounds(index)
        return numbers | self._update()

    @contextlib.contextmanager
    def _recording(self) -> Iterator[None]:
        def keep(name: str) -> Any:
            def hook(module: Any, args: Any, kwargs: Any, output: Any) -> None:
                if isinstance(output, torch.Tensor) and output.requires_grad:
                    output.retain_grad()
                first = args[0] if args else kwargs.get("hidden_states")
                self.seen[name].append((first, output))

            return hook

        handles = [
            module.register_forward_hook(keep(name), with_kwargs=True)
            for name, module in self.model.named_modules()
        ]
        path, name = self.family.spied
        original = vars(__import__(path, fromlist=["_"]))[name]

        def spy(module: Any, query: Any, key: Any, *args: Any, **kwargs: Any) -> Any:
            self.attended[module.layer_idx].append((query.detach(), key.detach(), kwargs))
            return original(module, query, key, *args, **kwargs)

        try:
            with mock.patch(f"{path}.{name}", spy):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _loss(self, batch: Batch) -> torch.Tensor:
        given = {name: value for name, value in batch.items() if name not in _TARGETS}
        hidden = self.model.base_model(use_cache=False, **given).last_hidden_state
        hidden.retain_grad()
        self.seen["head"].append((hidden, None))
        logits = hidden @ self.model.get_output_embeddings().weight.T
        self.logits.append(logits.detach())
        cap = vars(self.config).get("final_logit_softcapping")
        capped = logits if cap is None else cap * torch.tanh(logits / cap)
        log_z = capped.logsumexp(-1)
        labels = batch["labels"][:, 1:]
        targets = labels != -100
        counted = log_z[:, :-1][targets]
        # Other families hand out logits, of which nobody knows what becomes a target.
        self.log_z.append((counted if self.family is STABLE else log_z.flatten()).detach())
        picked = capped[:, :-1].gather(-1, labels.clamp(min=0)[..., None])[..., 0][targets]
        z_loss = (
            vars(self.config).get("z_loss", 0.0)
            * counted.square().sum()
            / batch["num_items_in_batch"]
        )
        self.z_loss += z_loss.item()
        return (counted - picked).sum() / batch["num_items_in_batch"] + z_loss

    # what passed ------------------------------------------------------------------------------

    def _places(self) -> Iterator[tuple[str, str]]:
        for index in range(len(self.model.get_submodule(self.family.blocks))):
            for word, path in self.family.linears.items():
                yield f"layers.{index}.{word}", f"{self.family.blocks}.{index}.{path}"

    def _linears(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for place, path in self._places():
            linear = self.model.get_submodule(path)
            inputs, outputs = zip(*self.seen[path], strict=True)
            # By the chain rule, so that other readers of X do not count.
            through = [output.grad @ map_of(linear) for output in outputs]
            found |= {
                f"{place}/input_l2": _norm(inputs),
                f"{place}/input_rms": _rms(inputs),
                f"{place}/output_l2": _norm(outputs),
                f"{place}/output_rms": _rms(outputs),
                f"{place}/input_grad_l2": _norm(through),
            }
            if type(linear).__name__ == "StableGPTSigmaLinear":
                found[f"{place}/gain"] = linear.gain.item()
        hidden = [first for first, _ in self.seen["head"]]
        found["head/input_l2"], found["head/input_rms"] = _norm(hidden), _rms(hidden)
        found["head/input_grad_l2"] = _norm([tensor.grad for tensor in hidden])
        embedded = [output for _, output in self.seen[self.family.embedding]]
        found["embed/output_l2"], found["embed/output_rms"] = _norm(embedded), _rms(embedded)
        return found

    def _streams(self) -> dict[str, float]:
        readers = {"stream/final_std": self.family.final}
        for index in range(len(self.model.get_submodule(self.family.blocks))):
            block = f"{self.family.blocks}.{index}"
            readers[f"layers.{index}.stream/attention_std"] = block
            readers[f"layers.{index}.stream/mlp_std"] = f"{block}.{self.family.mlp_reader}"
        return {
            name: torch.cat([first.flatten() for first, _ in self.seen[path]])
            .std(correction=0)
            .item()
            for name, path in readers.items()
        }

    def _head(self) -> dict[str, float]:
        logits, log_z = (
            torch.cat([tensor.flatten() for tensor in tensors])
            for tensors in (self.logits, self.log_z)
        )
        found = {
            "head/log_z_mean": log_z.mean().item(),
            "head/log_z_max": log_z.max().item(),
            "head/logit_mean": logits.mean().item(),
            "head/logit_max": logits.max().item(),
        }
        return found | ({"head/z_loss": self.z_loss} if self.z_loss else {})

    # attention --------------------------------------------------------------------------------

    def _queries_and_keys(self, index: int) -> list[tuple[torch.Tensor, torch.Tensor, float]]:
        """(B, H, S, D), (B, G, S, D) and the scale of each microbatch."""
        if self.family is not STABLE:
            return [(q, k, more["scaling"]) for q, k, more in self.attended[index]]
        path = f"model.layers.{index}.self_attn"
        config, found = self.config, []
        for batch, (_, q), (_, k) in zip(
            self.batches, self.seen[f"{path}.q_norm"], self.seen[f"{path}.k_norm"], strict=True
        ):
            length = q.shape[1]
            positions = batch.get("position_ids", torch.arange(length)[None])
            theta = config.rope_parameters["rope_theta"]
            query = turn(split(q.detach(), config.num_attention_heads), positions, theta)
            key = turn(split(k.detach(), config.num_key_value_heads), positions, theta)
            found.append((query, key, config.attention_multiplier / math.sqrt(config.head_dim)))
        return found

    def _attention(self, index: int) -> dict[str, Any]:
        place, config = f"layers.{index}.attention", self.config
        pairs = self._queries_and_keys(index)
        cap = vars(config).get("attn_logit_softcapping")
        clip = self._clip()
        logits, capped_logits, entropies, dead = [], [], [], []
        for batch, (query, key, scaling) in zip(self.batches, pairs, strict=True):
            visible = visible_keys(batch)
            if index in self.family.windows:
                visible = visible.triu(1 - self.family.windows[index])
            scores = scores_of(query, key, scaling)
            probs, capped = probabilities(scores, visible, cap)
            hidden = ~visible[:, None].expand_as(scores)
            logits.append(scores.masked_fill(hidden, -math.inf).amax((0, 2, 3)))
            capped_logits.append(capped.masked_fill(hidden, -math.inf).amax((0, 2, 3)))
            keys = visible.sum(-1)[:, None].expand(scores.shape[:3])
            entropy = -torch.special.xlogy(probs, probs).sum(-1) / keys.double().log()
            shut = (stretch(probs, visible, clip).masked_fill(hidden, 0) <= 0).all(-1)
            for head in range(scores.shape[1]):
                entropies.append((head, entropy[:, head][keys[:, head] > 1]))
                dead.append((head, shut[:, head][keys[:, head] > 0]))
        found = {
            f"{place}/max_logit": torch.stack(logits).amax(0).tolist(),
            f"{place}/entropy": _means(entropies),
            f"{place}/q_l2": _head_norms([query for query, _, _ in pairs]),
            f"{place}/k_l2": _head_norms([key for _, key, _ in pairs]),
        }
        if cap is not None:
            found[f"{place}/max_logit_capped"] = torch.stack(capped_logits).amax(0).tolist()
        # Stretching alone cuts no row to zero.
        if clip["gamma"] is not None or clip["alpha"] is not None:
            found[f"{place}/clipped_rows"] = _means(dead)
        return found | self._score_norms(index)

    def _clip(self) -> dict[str, Any]:
        fields = {name: vars(self.config).get(f"attention_clip_{name}") for name in _NO_CLIP}
        return {**fields, "zeta": fields["zeta"] or 1.0}

    def _score_norms(self, index: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        path = f"{self.family.blocks}.{index}.{self.family.attention}"
        children = dict(self.model.get_submodule(path).named_children())
        for name, heads in (
            ("q", self.config.num_attention_heads),
            ("k", self.config.to_dict().get("num_key_value_heads")),
        ):
            norm = children.get(f"{name}_norm")
            if norm is None or isinstance(norm, nn.Identity):
                continue
            before = [first.detach() for first, _ in self.seen[f"{path}.{name}_norm"]]
            before = [
                split(first, heads) if first.ndim == 3 else self._heads_first(first, heads)
                for first in before
            ]
            place = f"layers.{index}.attention"
            found[f"{place}/{name}_l2_before_norm"] = _head_norms(before)
            found[f"{place}/{name}_gain_max"] = self._gain(norm)
        return found

    def _heads_first(self, tensor: torch.Tensor, heads: int) -> torch.Tensor:
        """Families disagree on whether their norms get (B, S, H, D) or (B, H, S, D)."""
        length = self.batches[0]["input_ids"].shape[1]
        assert length != heads
        return tensor if tensor.shape[1] == heads else tensor.transpose(1, 2)

    def _gain(self, norm: nn.Module) -> float:
        origin = self.family.gain_origin
        if self.family is STABLE:
            origin = 1.0 if self.config.zero_centered_norm else 0.0
        return (norm.weight.detach() + origin).abs().max().item()

    # weights ----------------------------------------------------------------------------------

    def _weighted(self) -> dict[str, torch.Tensor]:
        found = {place: self.model.get_submodule(path).weight for place, path in self._places()}
        found["embed"] = self.model.get_input_embeddings().weight
        found["head"] = self.model.get_output_embeddings().weight
        return found

    def _weights(self) -> dict[str, float]:
        found: dict[str, float] = {}
        for place, weight in self._weighted().items():
            found[f"{place}/weight_l2"] = _norm([weight])
            found[f"{place}/weight_rms"] = _rms([weight])
            found[f"{place}/weight_grad_l2"] = _norm([weight.grad])
        return found

    def _groups(self) -> dict[str, list[str]]:
        groups: dict[str, list[str]] = defaultdict(list)
        head, embed = self._weighted()["head"], self._weighted()["embed"]
        for name, parameter in self.parameters.items():
            if name.startswith(f"{self.family.blocks}."):
                index = name.removeprefix(f"{self.family.blocks}.").split(".")[0]
                groups[f"layers.{index}.optimizer"].append(name)
            elif parameter is embed:
                groups["embed.optimizer"].append(name)
            elif parameter is head:
                groups["head.optimizer"].append(name)
            else:
                groups["other.optimizer"].append(name)
        return {**groups, "optimizer": list(self.parameters)}

    @torch.no_grad()
    def _update(self) -> dict[str, Any]:
        """AdamW (Loshchilov and Hutter 2019, algorithm 2), written out."""
        adam, found = self.adam, {}
        self.steps += 1
        changes, ratios = {}, {}
        for name, parameter in self.parameters.items():
            m, v = self.moments[name]
            m = adam.betas[0] * m + (1 - adam.betas[0]) * parameter.grad
            v = adam.betas[1] * v + (1 - adam.betas[1]) * parameter.grad**2
            self.moments[name] = (m, v)
            m, v = m / (1 - adam.betas[0] ** self.steps), v / (1 - adam.betas[1] ** self.steps)
            ratios[name] = (m.abs() / v.sqrt()).nan_to_num(0.0).flatten()
            changes[name] = -adam.lr * (
                m / (v.sqrt() + adam.eps) + adam.weight_decay * parameter.data
            )
        for group, names in self._groups().items():
            grads = [self.parameters[name].grad for name in names]
            found[f"{group}/grad_rms"] = _rms(grads)
            found[f"{group}/grad_rms_over_eps"] = _rms(grads) / adam.eps
            found[f"{group}/update_l2"] = _norm([changes[name] for name in names])
            bins = torch.bucketize(
                torch.cat([ratios[name] for name in names]), torch.tensor(EDGES).double()
            )
            counts = torch.bincount(bins, minlength=len(EDGES) + 1).double()
            found[f"{group}/adam_ratio"] = (counts / counts.sum()).tolist()
        for place, weight in self._weighted().items():
            name = next(name for name, each in self.parameters.items() if each is weight)
            found[f"{place}/weight_update_ratio"] = _norm([changes[name]]) / _norm([weight])
        for name, change in changes.items():
            self.parameters[name].add_(change)
        return found

    # Spike No More ----------------------------------------------------------------------------

    def _bounds(self, index: int) -> dict[str, float]:
        place, path = f"layers.{index}", f"model.layers.{index}"
        block, found = self.model.get_submodule(path), {}
        norms = {
            name: torch.linalg.svdvals(map_of(block.get_submodule(STABLE.linears[name])))[0].item()
            for name in ("proj", "fc1", "fc2")
        }
        for name, norm in norms.items():
            found[f"{place}.{name}/weight_spectral"] = norm
        streams = self._streams()
        if isinstance(block.post_attention_layernorm, nn.Identity) and not isinstance(
            block.input_layernorm, nn.Identity
        ):
            factor = norms["proj"] * self.jacobian_norm(index)
            factor *= self._largest(block.input_layernorm) * self._largest(block.attention_scale)
            spread = streams[f"{place}.stream/attention_std"]
            found[f"{place}.stream/attention_bound"] = 1 + factor / spread
        if isinstance(block.post_feedforward_layernorm, nn.Identity) and not isinstance(
            block.pre_feedforward_layernorm, nn.Identity
        ):
            factor = norms["fc1"] * norms["fc2"]
            factor *= self._largest(block.pre_feedforward_layernorm)
            factor *= self._largest(block.mlp_scale)
            found[f"{place}.stream/mlp_bound"] = 1 + factor / streams[f"{place}.stream/mlp_std"]
        return found

    def _largest(self, module: nn.Module) -> float:
        if isinstance(module, nn.Identity):
            return 1.0
        if type(module).__name__ == "StableGPTLayerScale":
            return module.weight.abs().max().item()
        return self._gain(module)

    def jacobian_norm(self, index: int) -> float:
        """Largest singular value of the whole J^Z, of the last microbatch's first sequence."""
        config = self.config
        attention = self.model.get_submodule(f"model.layers.{index}.self_attn")
        (normed, _), weight = (
            self.seen[f"model.layers.{index}.self_attn.qkv_proj"][-1],
            map_of(attention.qkv_proj),
        )
        heads, key_heads = config.num_attention_heads, config.num_key_value_heads
        length = normed.shape[1]
        places = torch.arange(length)[None]
        visible = torch.ones(1, length, length, dtype=torch.bool).tril()
        theta = config.rope_parameters["rope_theta"]

        def outputs(hidden: torch.Tensor) -> torch.Tensor:
            query, key, value = (hidden @ weight.T).split(attention.widths, dim=-1)
            query = turn(split(attention.q_norm(query), heads), places, theta)
            key = turn(split(attention.k_norm(key), key_heads), places, theta)
            value = split(attention.v_norm(value), key_heads)
            scale = config.attention_multiplier / math.sqrt(config.head_dim)
            scores = scores_of(query, key, scale)
            probs, _ = probabilities(scores, visible, config.attn_logit_softcapping)
            shares = probs
            if self._clip() != _NO_CLIP:
                shares = stretch(probs, visible, self._clip()).clamp(0, 1)
                shares = shares * visible[:, None]
            value = value.repeat_interleave(heads // key_heads, dim=1)
            return (shares @ value).transpose(1, 2).flatten(2)

        jacobian = torch.autograd.functional.jacobian(outputs, normed[:1].detach(), vectorize=True)
        size = normed[0].numel()
        return torch.linalg.svdvals(jacobian.reshape(-1, size))[0].item()


_TARGETS = ("labels", "num_items_in_batch")
_NO_CLIP = {"gamma": None, "zeta": 1.0, "alpha": None}


def _means(parts: list[tuple[int, torch.Tensor]]) -> list[float]:
    """Each head's mean over rows."""
    heads = sorted({head for head, _ in parts})
    return [
        torch.cat([rows for head, rows in parts if head == one]).double().mean().item()
        for one in heads
    ]
