"""Traces, steering vectors from pairs of answers, and what they do to a model."""

from typing import TYPE_CHECKING

from ..kernels.lazy_imports import lazy_package

if TYPE_CHECKING:
    from .extract import AT as AT
    from .extract import METHODS as METHODS
    from .extract import Extraction as Extraction
    from .extract import OnProgress as OnProgress
    from .extract import extract as extract
    from .extract import extract_encoded as extract_encoded
    from .labels import PromptForm as PromptForm
    from .labels import label_of as label_of
    from .layer_sums import LayerMetrics as LayerMetrics
    from .monitor import LensMonitor as LensMonitor
    from .pair_states import pair_states as pair_states
    from .pairs import Pair as Pair
    from .pairs import read_pairs as read_pairs
    from .prompts import PairIds as PairIds
    from .prompts import Side as Side
    from .prompts import balance as balance
    from .prompts import encode_contrast as encode_contrast
    from .prompts import encode_pair as encode_pair
    from .prompts import encode_pairs as encode_pairs
    from .prompts import longest as longest
    from .propensity import PROTOCOLS as PROTOCOLS
    from .propensity import Item as Item
    from .propensity import Variants as Variants
    from .propensity import propensities as propensities
    from .report import SteerabilityReport as SteerabilityReport
    from .report_table import curve_table as curve_table
    from .report_table import layer_map as layer_map
    from .report_table import slopes_table as slopes_table
    from .report_table import summary_lines as summary_lines
    from .slopes import MULTIPLIERS as MULTIPLIERS
    from .slopes import Slope as Slope
    from .slopes import difference as difference
    from .slopes import difference_each as difference_each
    from .slopes import example_slopes as example_slopes
    from .slopes import mean_curve_fit as mean_curve_fit
    from .slopes import spearman as spearman
    from .slopes import summarize as summarize
    from .slopes import summarize_each as summarize_each
    from .split import split_pairs as split_pairs
    from .steerability import Sweep as Sweep
    from .steerability import steerability as steerability
    from .steerability import steerability_encoded as steerability_encoded
    from .steered import steered as steered
    from .suggest import Suggestion as Suggestion
    from .suggest import suggest as suggest
    from .trace import Trace as Trace
    from .trace_table import print_trace as print_trace
    from .unembedding import Unembedding as Unembedding
    from .watch import Watch as Watch
    from .watch import watch as watch

lazy_package(__name__)
