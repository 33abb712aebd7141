"""Traces, steering vectors from pairs of answers, and what they do to a model."""

import sys
from typing import TYPE_CHECKING

from ..kernels.lazy_imports import lazy_package

__all__ = [
    "AT",
    "METHODS",
    "MULTIPLIERS",
    "PROTOCOLS",
    "Extraction",
    "Item",
    "OnProgress",
    "Pair",
    "PairIds",
    "PromptForm",
    "Side",
    "Slope",
    "SteerabilityReport",
    "Suggestion",
    "Sweep",
    "Trace",
    "Variants",
    "balance",
    "curve_table",
    "difference",
    "difference_each",
    "encode_contrast",
    "encode_pair",
    "encode_pairs",
    "example_slopes",
    "extract",
    "extract_encoded",
    "label_of",
    "layer_map",
    "longest",
    "mean_curve_fit",
    "pair_states",
    "print_trace",
    "propensities",
    "read_pairs",
    "slopes_table",
    "spearman",
    "split_pairs",
    "steerability",
    "steerability_encoded",
    "suggest",
    "summarize",
    "summarize_each",
    "summary_lines",
]

if TYPE_CHECKING:
    from .extract import AT, METHODS, Extraction, OnProgress, extract, extract_encoded, pair_states
    from .labels import PromptForm, label_of
    from .pairs import Pair, read_pairs
    from .prompts import (
        PairIds,
        Side,
        balance,
        encode_contrast,
        encode_pair,
        encode_pairs,
        longest,
    )
    from .propensity import PROTOCOLS, Item, Variants, propensities
    from .report import SteerabilityReport
    from .report_table import curve_table, layer_map, slopes_table, summary_lines
    from .slopes import (
        MULTIPLIERS,
        Slope,
        difference,
        difference_each,
        example_slopes,
        mean_curve_fit,
        spearman,
        summarize,
        summarize_each,
    )
    from .split import split_pairs
    from .steerability import Sweep, steerability, steerability_encoded
    from .suggest import Suggestion, suggest
    from .trace import Trace
    from .trace_table import print_trace
else:
    _HOMES = {
        "AT": ".extract",
        "METHODS": ".extract",
        "MULTIPLIERS": ".slopes",
        "PROTOCOLS": ".propensity",
        "Extraction": ".extract",
        "Item": ".propensity",
        "OnProgress": ".extract",
        "Pair": ".pairs",
        "PairIds": ".prompts",
        "PromptForm": ".labels",
        "Side": ".prompts",
        "Slope": ".slopes",
        "SteerabilityReport": ".report",
        "Suggestion": ".suggest",
        "Sweep": ".steerability",
        "Trace": ".trace",
        "Variants": ".propensity",
        "balance": ".prompts",
        "curve_table": ".report_table",
        "difference": ".slopes",
        "difference_each": ".slopes",
        "encode_contrast": ".prompts",
        "encode_pair": ".prompts",
        "encode_pairs": ".prompts",
        "example_slopes": ".slopes",
        "extract": ".extract",
        "extract_encoded": ".extract",
        "label_of": ".labels",
        "layer_map": ".report_table",
        "longest": ".prompts",
        "mean_curve_fit": ".slopes",
        "pair_states": ".extract",
        "print_trace": ".trace_table",
        "propensities": ".propensity",
        "read_pairs": ".pairs",
        "slopes_table": ".report_table",
        "spearman": ".slopes",
        "split_pairs": ".split",
        "steerability": ".steerability",
        "steerability_encoded": ".steerability",
        "suggest": ".suggest",
        "summarize": ".slopes",
        "summarize_each": ".slopes",
        "summary_lines": ".report_table",
    }
    sys.modules[__name__].__class__ = lazy_package(_HOMES)
