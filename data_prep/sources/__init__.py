"""Where patches come from: one module per layout, each behind `base.Source`; `detect.open_source` picks the module."""
