//! Finding zero pages at the speed of memory.
#![allow(unsafe_code)] // reads guest pages, which change meanwhile, through vector loads

use mem::PAGE_SIZE;

/// How many pages before it is looked at a page is fetched, so that many waits for memory overlap.
pub const AHEAD: usize = 16;

/// Fetches the first word that [`is_zero`] looks at. Any address will do; a wrong one is no harm.
#[inline]
pub fn prefetch(page: *const u8) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: a hint, which never faults.
        unsafe { _mm_prefetch(page.cast(), _MM_HINT_T0) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = page;
}

/// Whether the page at `page` holds only zeroes. The guest may write it meanwhile: then either
/// answer is right, for the page is dirty and comes again.
///
/// # Safety
/// `page` must be the address of [`PAGE_SIZE`] mapped, readable bytes, aligned to them.
pub unsafe fn is_zero(page: *const u8) -> bool {
    debug_assert_eq!(page as usize % PAGE_SIZE as usize, 0);
    // Most pages that are not zero say so in one of a few words.
    for at in [0, 2048, 4088, 1024, 3072] {
        // SAFETY: inside the page and aligned to 8; volatile, because the guest writes it too.
        if unsafe { page.add(at).cast::<u64>().read_volatile() } != 0 {
            return false;
        }
    }
    #[cfg(target_arch = "x86_64")]
    {
        if std::arch::is_x86_feature_detected!("avx2") {
            // SAFETY: AVX2 is there (checked), and the caller vouches for the page.
            return unsafe { is_zero_avx2(page) };
        }
    }
    // SAFETY: the caller vouches for the page.
    unsafe { is_zero_words(page) }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
unsafe fn is_zero_avx2(page: *const u8) -> bool {
    use std::arch::x86_64::{__m256i, _mm256_load_si256, _mm256_or_si256, _mm256_testz_si256};
    let mut at = 0;
    while at < PAGE_SIZE as usize {
        // SAFETY: 256 bytes from `at` are inside the page, which is aligned to more than 32.
        let any = unsafe {
            let p = page.add(at).cast::<__m256i>();
            let a = _mm256_or_si256(_mm256_load_si256(p), _mm256_load_si256(p.add(1)));
            let b = _mm256_or_si256(_mm256_load_si256(p.add(2)), _mm256_load_si256(p.add(3)));
            let c = _mm256_or_si256(_mm256_load_si256(p.add(4)), _mm256_load_si256(p.add(5)));
            let d = _mm256_or_si256(_mm256_load_si256(p.add(6)), _mm256_load_si256(p.add(7)));
            _mm256_or_si256(_mm256_or_si256(a, b), _mm256_or_si256(c, d))
        };
        if _mm256_testz_si256(any, any) == 0 {
            return false;
        }
        at += 256;
    }
    true
}

/// Word by word, in blocks that compilers turn into the base instruction set's vectors.
unsafe fn is_zero_words(page: *const u8) -> bool {
    let words = page.cast::<u64>();
    let mut i = 0;
    while i < PAGE_SIZE as usize / 8 {
        let mut any = 0;
        for k in 0..16 {
            // SAFETY: i + k is below the page's 512 words, aligned as the page is.
            any |= unsafe { words.add(i + k).read_volatile() };
        }
        if any != 0 {
            return false;
        }
        i += 16;
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[repr(align(4096))]
    struct Page([u8; PAGE_SIZE as usize]);

    #[test]
    fn finds_every_single_byte() {
        let mut page = Box::new(Page([0; PAGE_SIZE as usize]));
        for at in 0..PAGE_SIZE as usize {
            page.0[at] = 1;
            let p = page.0.as_ptr();
            // SAFETY: p is a whole aligned page of ours.
            unsafe {
                assert!(!is_zero(p), "{at}");
                assert!(!is_zero_words(p), "{at}");
            }
            page.0[at] = 0;
        }
        let p = page.0.as_ptr();
        // SAFETY: as above.
        unsafe { assert!(is_zero(p) && is_zero_words(p)) };
    }
}
