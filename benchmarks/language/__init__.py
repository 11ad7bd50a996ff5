"""Language models and sentence encoders, packed: quality beside other quantisers, calibration, memory."""
