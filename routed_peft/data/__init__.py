"""Data: labels of documents, rows and tokens, and batches of labeled rows."""

from routed_peft.data.collator import RoutedCollator, shift
from routed_peft.data.columns import (
    ROUTE_LABEL,
    ROUTE_LABELS,
    ROUTE_WEIGHTS,
    check_route_columns,
    class_names,
    route_column,
)
from routed_peft.data.documents import (
    DocumentArguments,
    check_both_sides,
    check_evaluation,
    count_left_out,
    evaluation_rows,
    first_of,
    labeled_documents,
    labeled_tokens,
    select_arm,
)
from routed_peft.data.frequencies import add_frequency_weights, token_frequency_weights, tokens_of_words
from routed_peft.data.labels import (
    FORGET,
    RETAIN,
    UNLABELED,
    label_statistics,
    labels_from_classifier,
    labels_from_column,
    labels_from_keywords,
    labels_from_tokens,
    simulate_labels,
)
from routed_peft.data.loading import load_texts, load_training_file
from routed_peft.data.packing import pack
from routed_peft.data.schedule import schedule
from routed_peft.data.tokenizer import train_tokenizer
from routed_peft.deprecation import renamed

__all__ = ["FORGET", "RETAIN", "ROUTE_LABEL", "ROUTE_LABELS", "ROUTE_WEIGHTS", "UNLABELED", "DocumentArguments"]
__all__ += ["RoutedCollator", "add_frequency_weights", "check_both_sides", "check_evaluation", "check_route_columns"]
__all__ += ["class_names", "count_left_out", "evaluation_rows", "first_of", "label_statistics", "labeled_documents"]
__all__ += ["labeled_tokens", "labels_from_classifier", "labels_from_column", "labels_from_keywords"]
__all__ += ["labels_from_tokens", "load_texts", "load_training_file", "pack", "route_column", "schedule", "select_arm"]
__all__ += ["shift", "simulate_labels", "token_frequency_weights", "tokens_of_words", "train_tokenizer"]

__getattr__ = renamed(__name__, {"of_arm": "select_arm"})
