"""The settings of every stage, what their texts mean, and how they are resolved."""

from .resolve import (
    Resolved,
    check_value,
    parse_set,
    read_yaml,
    recipe_names,
    recipe_path,
    resolve,
    stage_fields,
)
from .settings import (
    STAGES,
    AdaptConfig,
    GeneralConfig,
    MeasureConfig,
    RegenerateConfig,
    SelectConfig,
    TrainConfig,
    key_of,
)
from .values import Budget, read_budget, read_endpoints, read_format, read_shares, read_width

__all__ = [
    "STAGES",
    "AdaptConfig",
    "Budget",
    "GeneralConfig",
    "MeasureConfig",
    "RegenerateConfig",
    "Resolved",
    "SelectConfig",
    "TrainConfig",
    "check_value",
    "key_of",
    "parse_set",
    "read_budget",
    "read_endpoints",
    "read_format",
    "read_shares",
    "read_width",
    "read_yaml",
    "recipe_names",
    "recipe_path",
    "resolve",
    "stage_fields",
]
