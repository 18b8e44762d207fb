//! The init of the guests of the switch's tests, and the tools in them. See `e2e::netguest`.

fn main() {
    if std::process::id() == 1 {
        e2e::netguest::agent::main()
    }
    std::process::exit(e2e::netguest::tool());
}
