"""Films in, pixel_values out."""
