"""Near-duplicates: photos that show the same picture, re-encoded, resized, cropped, mirrored or brightened."""
