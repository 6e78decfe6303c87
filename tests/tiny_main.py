"""main.py with the two blocks of tests/tiny.py in place of seven, which compile in a third of the time."""

import main
from tests.tiny import few_blocks

if __name__ == '__main__':
    with few_blocks():
        main.main()
