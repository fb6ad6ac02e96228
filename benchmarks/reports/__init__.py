"""Size and opening time of HTML reports, and their screenshots."""
