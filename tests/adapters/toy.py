"""The row of the toy adapter, whose code is `neuron.py`: what docs/add-an-adapter.md builds."""

from redraft.adapters.table import AdapterRow

NEURON = AdapterRow(
    "neuron",
    "one more FFN neuron in every layer",
    "tests.adapters.neuron:Neuron",
    excludes=("expert",),
    because="an expert adds neurons too; for one more, make its width one larger",
)
