"""Data: documents from files or `datasets` -> tokens on disk -> blocks, in a seekable order."""

from hf_stable.data.blocks import BlockDataset, TokenFile
from hf_stable.data.building import build_token_file
from hf_stable.data.ngrams import NgramBaselines, ngram_cross_entropy
from hf_stable.data.order import DataOrder, data_loader, microbatches
from hf_stable.data.report import ReadReport
from hf_stable.data.sample import SampleText, write_sample_text
from hf_stable.data.sources import Source, expand, read_documents
from hf_stable.data.tokenizer import boundary_ids, load_tokenizer, train_tokenizer

__all__ = [
    "BlockDataset",
    "DataOrder",
    "NgramBaselines",
    "ReadReport",
    "SampleText",
    "Source",
    "TokenFile",
    "boundary_ids",
    "build_token_file",
    "data_loader",
    "expand",
    "load_tokenizer",
    "microbatches",
    "ngram_cross_entropy",
    "read_documents",
    "train_tokenizer",
    "write_sample_text",
]
