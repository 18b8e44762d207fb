//! The init of the guests that tests, demo and benchmarks boot. See `e2e::guest`.

fn main() {
    if std::process::id() != 1 {
        eprintln!("tern-guest is the init of a guest; it does nothing as an ordinary process");
        std::process::exit(2);
    }
    e2e::guest::init::main()
}
