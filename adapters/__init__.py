"""Array frameworks on top of the engine, one thin module each; packaged as `sbncore.adapters`."""
