"""What comes in: folders and tables, the decoder, the split, augmentation."""
