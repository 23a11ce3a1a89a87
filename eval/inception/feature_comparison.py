"""Base of the metrics that compare two tables of features after everything has been gathered."""

from __future__ import annotations

from ..metric import Metric, Pairs, State
from .feature_table import FeatureTable
from .reference import InceptionReference


class FeatureComparison(Metric):
    """Gathers nothing itself: a :class:`~vistok.eval.inception.feature_table.FeatureTable` beside it does.

    Args:
        table: of the reconstructions, among the metrics of the same variant.
        reference: which keeps features too.

    Raises:
        MetricUnavailable: if the reference does not.
    """

    def __init__(self, table: FeatureTable, reference: InceptionReference) -> None:
        reference.require(features=True)
        self.table = table
        self.reference = reference

    def update(self, pairs: Pairs) -> None:
        pass

    def state_dict(self) -> State:
        return {}

    def merge(self, state: State) -> None:
        pass
