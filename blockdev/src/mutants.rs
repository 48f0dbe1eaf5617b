//! Defects planted on purpose, to see whether the tests find them.
//!
//! `if mutant!("name") { ... }` stands where the defect goes. Without the feature
//! `mutants` it is the constant `false`, and the compiler removes it and what it guards.
//! With it, the variable `UEXT_MUTANT` names the one defect that is active, so that one
//! build serves for all.
//!
//! Invariant: no build without debug assertions has the feature, so no release build can.

#[cfg(all(feature = "mutants", not(debug_assertions)))]
compile_error!("the feature `mutants` plants defects: it is for tests, never for a release build");

/// Whether a planted defect is active; always false without the feature `mutants`.
#[cfg(not(feature = "mutants"))]
#[macro_export]
macro_rules! mutant {
    ($name:literal) => {
        false
    };
}

/// Whether a planted defect is active; always false without the feature `mutants`.
#[cfg(feature = "mutants")]
#[macro_export]
macro_rules! mutant {
    ($name:literal) => {
        $crate::mutants::is_active($name)
    };
}

/// Whether `UEXT_MUTANT` names this defect. Says so once on standard error when first asked,
/// so that a defect that no test came by can be told from one that no test found.
#[cfg(feature = "mutants")]
pub fn is_active(name: &str) -> bool {
    use std::sync::{LazyLock, Once};
    static NAME: LazyLock<Option<String>> = LazyLock::new(|| std::env::var("UEXT_MUTANT").ok());
    static REACHED: Once = Once::new();
    let active = NAME.as_deref() == Some(name);
    if active {
        REACHED.call_once(|| eprintln!("MUTANT {name} reached"));
    }
    active
}
