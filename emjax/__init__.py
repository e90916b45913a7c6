"""emjax: JAX-native segmentation of electron-microscopy volumes."""

__version__ = "0.1.0"
