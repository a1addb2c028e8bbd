"""The embedded tiny checkpoint: its pictures, curriculum, model, training and evaluation."""
