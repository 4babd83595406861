"""Data: documents from files or `datasets` -> tokens on disk -> blocks, in a seekable order."""

from hf_stable.data.blocks import BlockDataset
from hf_stable.data.building import build_token_file
from hf_stable.data.checking import refuse_unusable
from hf_stable.data.expanding import expand, has_splits
from hf_stable.data.loading import data_loader, microbatches
from hf_stable.data.mixture import MixtureOrder, TokenMixture, apportion
from hf_stable.data.ngrams import NgramBaselines, ngram_cross_entropy
from hf_stable.data.order import DataOrder, Order
from hf_stable.data.report import ReadReport
from hf_stable.data.sample import SampleText, write_sample_text
from hf_stable.data.sources import Source, read_documents
from hf_stable.data.token_file import TokenFile
from hf_stable.data.tokenizer import boundary_ids, load_tokenizer, shortage, train_tokenizer

__all__ = [
    "BlockDataset",
    "DataOrder",
    "MixtureOrder",
    "NgramBaselines",
    "Order",
    "ReadReport",
    "SampleText",
    "Source",
    "TokenFile",
    "TokenMixture",
    "apportion",
    "boundary_ids",
    "build_token_file",
    "data_loader",
    "expand",
    "has_splits",
    "load_tokenizer",
    "microbatches",
    "ngram_cross_entropy",
    "read_documents",
    "refuse_unusable",
    "shortage",
    "train_tokenizer",
    "write_sample_text",
]
