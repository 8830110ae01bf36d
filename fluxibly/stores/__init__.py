"""Where middleware keep what calls share."""
