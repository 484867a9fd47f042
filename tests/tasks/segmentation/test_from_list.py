"""Images and masks from a list."""

from lora_plugins.tasks import (
    MaskListDataModule,
)

from ..conftest import SIZE, loaded, written


class TestLists:
    def test_masks(self, mask_folders):
        rows = [
            {"image": f"images/{s}/{i}.jpg", "mask": f"masks/{s}/{i}.png", "split": s}
            for s, count in (("train", 4), ("val", 2))
            for i in range(count)
        ]
        data = loaded(MaskListDataModule(written(mask_folders / "l.csv", rows), classes=["a", "b", "c"], **SIZE))
        assert data.splits["val"][0]["target"].shape == (8, 8)
