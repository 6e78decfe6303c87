"""Numbers: formats, rounding, optimizers, schedules, averages, augmentation, losses. Knows neither layers nor hosts."""
