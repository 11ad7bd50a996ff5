"""The converter: options, sources, the plan, calibration, fitting, and the pipeline that joins them."""
