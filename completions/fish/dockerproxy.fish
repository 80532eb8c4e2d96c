# Completion of dockerproxy(1) in fish. The command itself proposes the words, by argcomplete.
function __fish_dockerproxy_complete
    set -lx _ARGCOMPLETE 1
    set -lx _ARGCOMPLETE_DFS \t
    set -lx _ARGCOMPLETE_IFS \n
    set -lx _ARGCOMPLETE_SUPPRESS_SPACE 1
    set -lx _ARGCOMPLETE_SHELL fish
    set -lx COMP_LINE (commandline -p)
    set -lx COMP_POINT (string length -- (commandline -cp))
    set -lx COMP_TYPE
    set -l command (commandline -op)[1]
    $command 8>&1 9>&2 1>/dev/null 2>&1 </dev/null
end
complete -c dockerproxy -f -a '(__fish_dockerproxy_complete)'
