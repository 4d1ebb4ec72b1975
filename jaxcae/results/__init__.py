"""What a trained model gives: scores per sample, analysis of the encoder, export to files."""
