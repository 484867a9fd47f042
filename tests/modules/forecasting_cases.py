"""pytorch-forecasting: series of numbers, by recurrent layers, attention and stacks of linear layers."""

import functools
import warnings

import numpy as np

from tests.modules.case import Case


@functools.cache
def _series(known):
    import pandas as pd
    from pytorch_forecasting import TimeSeriesDataSet

    numbers = np.random.default_rng(0)
    frame = pd.DataFrame(
        {
            "time_idx": np.tile(np.arange(40), 3),
            "group": np.repeat(["a", "b", "c"], 40),
            "value": numbers.normal(size=120).cumsum(),
        }
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return TimeSeriesDataSet(
            frame,
            time_idx="time_idx",
            target="value",
            group_ids=["group"],
            max_encoder_length=8,
            min_encoder_length=8,
            max_prediction_length=4,
            min_prediction_length=4,
            time_varying_unknown_reals=["value"],
            time_varying_known_reals=["time_idx"] if known else [],
        )


def _case(name, known=False, **arguments):
    def build():
        import pytorch_forecasting

        return getattr(pytorch_forecasting, name).from_dataset(_series(known), **arguments)

    return Case(
        "pytorch-forecasting",
        name,
        build,
        lambda: _series(known).to_dataloader(train=False, batch_size=8, num_workers=0),
        objects=True,
    )


CASES = [
    _case("TemporalFusionTransformer", hidden_size=8, attention_head_size=1, dropout=0.0, hidden_continuous_size=4),
    _case("NBeats", widths=[16, 16], backcast_loss_ratio=0.1),
    _case("NHiTS", hidden_size=16),
    _case("DeepAR", hidden_size=8, rnn_layers=1, dropout=0.0),
    _case("RecurrentNetwork", cell_type="GRU", hidden_size=8, rnn_layers=2, dropout=0.0),
    _case("DecoderMLP", known=True, hidden_size=16, dropout=0.0),
    _case("TiDEModel", hidden_size=16),
]
