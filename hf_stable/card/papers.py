"""Techniques by field, with their papers and the rows of the studies that test them.

Neutral values are those of StableGPTConfig and of the recipe's schema (a test compares them), so
that a card does not need torch.
"""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Paper:
    """A paper; `authors` is in BibTeX's format, and may end in "and others"."""

    key: str
    authors: str
    title: str
    year: int
    arxiv: str

    @property
    def short(self) -> str:
        """First author's family name, and the year."""
        first, *others = self.authors.split(" and ")
        more = " et al." if others else ""
        return f"{first.split(',')[0].strip('{}')}{more} {self.year}"

    @property
    def address(self) -> str:
        """Address of its page on arXiv."""
        return f"https://arxiv.org/abs/{self.arxiv}"

    @property
    def bibtex(self) -> str:
        """BibTeX entry."""
        return (
            f"@article{{{self.key},\n"
            f"  author = {{{self.authors}}},\n"
            f"  title = {{{{{self.title}}}}},\n"
            f"  journal = {{arXiv preprint arXiv:{self.arxiv}}},\n"
            f"  year = {{{self.year}}}\n"
            "}"
        )


@dataclass(frozen=True)
class Technique:
    """A field of the model's config, or of the recipe (with dots in its name).

    Args:
        field: Name of the field.
        neutral: Value of the field when the technique is off.
        name: Name for readers.
        papers: Keys of the papers.
        row: Row of the studies' tables, or None.
    """

    field: str
    neutral: Any
    name: str
    papers: tuple[str, ...] = ()
    row: str | None = None


_PAPERS = (
    Paper(
        "rybakov2024methods",
        "Rybakov, Oleg and Chrzanowski, Mike and Dykas, Peter and Xue, Jinze and Lanir, Ben",
        "Methods of improving LLM training stability",
        2024,
        "2410.16682",
    ),
    Paper(
        "takase2023spike",
        "Takase, Sho and Kiyono, Shun and Kobayashi, Sosuke and Suzuki, Jun",
        "Spike No More: Stabilizing the Pre-training of Large Language Models",
        2023,
        "2312.16903",
    ),
    Paper(
        "wortsman2023small",
        "Wortsman, Mitchell and Liu, Peter J. and Xiao, Lechao and Everett, Katie and others",
        "Small-scale proxies for large-scale Transformer training instabilities",
        2023,
        "2309.14322",
    ),
    Paper(
        "zhai2023stabilizing",
        "Zhai, Shuangfei and Likhomanenko, Tatiana and Littwin, Etai and Busbridge, Dan and others",
        "Stabilizing Transformer Training by Preventing Attention Entropy Collapse",
        2023,
        "2303.06296",
    ),
    Paper(
        "bondarenko2023quantizable",
        "Bondarenko, Yelysei and Nagel, Markus and Blankevoort, Tijmen",
        "Quantizable Transformers: Removing Outliers by Helping Attention Heads Do Nothing",
        2023,
        "2306.12929",
    ),
    Paper(
        "touvron2021going",
        "Touvron, Hugo and Cord, Matthieu and Sablayrolles, Alexandre and Synnaeve, Gabriel and "
        "Jégou, Hervé",
        "Going deeper with Image Transformers",
        2021,
        "2103.17239",
    ),
    Paper(
        "henry2020query",
        "Henry, Alex and Dachapally, Prudhvi Raj and Pawar, Shubham and Chen, Yuxuan",
        "Query-Key Normalization for Transformers",
        2020,
        "2010.04245",
    ),
    Paper(
        "dehghani2023scaling",
        "Dehghani, Mostafa and Djolonga, Josip and Mustafa, Basil and Padlewski, Piotr and others",
        "Scaling Vision Transformers to 22 Billion Parameters",
        2023,
        "2302.05442",
    ),
    Paper(
        "menary2024transformer",
        "Menary, Stephen and Kaski, Samuel and Freitas, Andre",
        "Transformer Normalisation Layers and the Independence of Semantic Subspaces",
        2024,
        "2406.17837",
    ),
    Paper(
        "kim2025peri",
        "Kim, Jeonghoon and others",
        "Peri-LN: Revisiting Normalization Layer in the Transformer Architecture",
        2025,
        "2502.02732",
    ),
    Paper(
        "gemma2024gemma2",
        "{Gemma Team} and others",
        "Gemma 2: Improving Open Language Models at a Practical Size",
        2024,
        "2408.00118",
    ),
    Paper(
        "zeng2022glm",
        "Zeng, Aohan and Liu, Xiao and Du, Zhengxiao and others",
        "GLM-130B: An Open Bilingual Pre-trained Model",
        2022,
        "2210.02414",
    ),
    Paper(
        "chowdhery2022palm",
        "Chowdhery, Aakanksha and Narang, Sharan and Devlin, Jacob and others",
        "PaLM: Scaling Language Modeling with Pathways",
        2022,
        "2204.02311",
    ),
    Paper(
        "zhang2019root",
        "Zhang, Biao and Sennrich, Rico",
        "Root Mean Square Layer Normalization",
        2019,
        "1910.07467",
    ),
    Paper(
        "wortsman2023stable",
        "Wortsman, Mitchell and Dettmers, Tim and Zettlemoyer, Luke and Morcos, Ari and others",
        "Stable and low-precision training for large-scale vision-language models",
        2023,
        "2304.13013",
    ),
    Paper(
        "kimi2025k2",
        "{Kimi Team} and others",
        "Kimi K2: Open Agentic Intelligence",
        2025,
        "2507.20534",
    ),
    Paper(
        "zhang2022opt",
        "Zhang, Susan and Roller, Stephen and Goyal, Naman and Artetxe, Mikel and others",
        "OPT: Open Pre-trained Transformer Language Models",
        2022,
        "2205.01068",
    ),
    Paper(
        "shazeer2020glu",
        "Shazeer, Noam",
        "GLU Variants Improve Transformer",
        2020,
        "2002.05202",
    ),
    Paper(
        "black2022gpt",
        "Black, Sid and Biderman, Stella and Hallahan, Eric and Anthony, Quentin and others",
        "GPT-NeoX-20B: An Open-Source Autoregressive Language Model",
        2022,
        "2204.06745",
    ),
)
PAPERS = {paper.key: paper for paper in _PAPERS}
# The paper whose baseline is the model without any technique (section 3).
BASELINE_PAPER = "rybakov2024methods"
_RYBAKOV, _TAKASE, _WORTSMAN, _ZHAI = (paper.key for paper in _PAPERS[:4])
_CLIP = ("bondarenko2023quantizable", _RYBAKOV)
_POST = (_RYBAKOV, "kim2025peri")

TECHNIQUES = (
    Technique("norm", "layernorm", "kind of every norm", ("zhang2019root",)),
    Technique("norm_bias", False, "norms with a bias"),
    Technique("norm_eps", 1e-6, "epsilon of the norms"),
    Technique("zero_centered_norm", False, "gains stored as their distance from 1"),
    Technique(
        "attention_pre_norm",
        True,
        "norm before attention",
        ("menary2024transformer", _RYBAKOV),
        "qkv_norm",
    ),
    Technique("mlp_pre_norm", True, "norm before the MLP"),
    Technique("attention_post_norm", False, "norm on Proj's output", _POST, "qk_fc_norm"),
    Technique("mlp_post_norm", False, "norm on FC2's output", _POST, "qk_fc_norm"),
    Technique("post_norm_gain", 1.0, "initial gain of the norms on outputs", ("kim2025peri",)),
    Technique("layer_scale", None, "LayerScale", ("touvron2021going", _RYBAKOV), "layer_scale"),
    Technique("embedding_scale", 1.0, "Scaled Embed", (_TAKASE,), "scaled_embed"),
    Technique("embedding_norm", False, "Embed LN", (_TAKASE,), "embed_norm"),
    Technique("embedding_detach", 1.0, "Embed Detach", ("zeng2022glm", _TAKASE), "embed_detach"),
    Technique("parallel_residual", False, "MLP beside attention", ("black2022gpt",)),
    Technique("mlp_gated", False, "gated MLP", ("shazeer2020glu",)),
    Technique("linear_bias", None, "linears with a bias"),
    Technique("sigma_reparam", False, "sigma-Reparam", (_ZHAI, _RYBAKOV), "sigma_reparam"),
    Technique("sigma_gain_init", "one", "initial gain of sigma-Reparam", (_ZHAI,)),
    Technique("mup_base_width", None, "simple muP", (_WORTSMAN,), "mup"),
    Technique(
        "qk_norm",
        None,
        "norm on queries and keys",
        ("henry2020query", "dehghani2023scaling", _RYBAKOV),
        "qk_norm",
    ),
    Technique("v_norm", None, "norm on values", ("menary2024transformer", _RYBAKOV), "qkv_norm"),
    Technique("attention_multiplier", 1.0, "temperature of attention", (_RYBAKOV,), "soft_temp"),
    Technique(
        "attn_logit_softcapping",
        None,
        "tanh cap of attention logits",
        ("gemma2024gemma2", _RYBAKOV),
        "soft_cap",
    ),
    Technique("attention_clip_gamma", None, "clipped softmax, lower", _CLIP, "soft_clip"),
    Technique("attention_clip_zeta", 1.0, "clipped softmax, upper", _CLIP, "soft_clip"),
    Technique("attention_clip_alpha", None, "clipped softmax by length", _CLIP[:1]),
    Technique("final_logit_softcapping", None, "tanh cap of output logits", ("gemma2024gemma2",)),
    Technique("z_loss", 0.0, "z-loss", ("chowdhery2022palm", _WORTSMAN), "z_loss"),
    Technique("initializer", "normal", "initializer"),
    Technique("initializer_range", 0.02, "std of the initializer"),
    Technique("embedding_std", None, "std of the embedding", (_TAKASE,)),
    Technique("depth_scaled_init", True, "Proj and FC2 begin smaller by depth"),
    Technique("optimizer.name", "adamw", "update rule", ("wortsman2023stable",)),
    Technique("optimizer.weight_decay_mode", "coupled", "weight decay", (_WORTSMAN,)),
    Technique("optimizer.clip_by", "global", "clipping by groups of parameters"),
    Technique("optimizer.late_max_grad_norm", None, "harder clipping late", ("zhang2022opt",)),
    Technique("optimizer.qk_clip", None, "QK-clip", ("kimi2025k2",)),
    Technique("guard.actions", [], "answers to loss spikes", ("chowdhery2022palm",)),
)
# Rows of the committed reports, by study; `scripts/studies/STUDY/report.md` holds them.
STUDIES = {
    "table3_cpu": (
        *("baseline", "soft_temp", "soft_clip", "sigma_reparam", "layer_scale", "soft_cap"),
        *("qk_norm", "qk_fc_norm", "qkv_norm", "qk_norm_cap"),
    ),
    "table3_cpu_more": ("z_loss", "scaled_embed", "embed_norm", "embed_detach", "mup"),
}
# GitHub's anchor of the section with a row for each method.
ANCHOR = "which-learning-rates-are-stable-in-the-style-of-table-3"
