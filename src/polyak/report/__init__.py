"""Reports: ``series`` has the numbers, ``figures`` draws them and is the only file that plots."""
