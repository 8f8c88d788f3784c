//! Products by cuBLASLt. The library computes in columns: our row-major `y[rows, d_out] = x W^T` is its column-major
//! `D[d_out, rows] = W'^T x'`, with W' the `[d_in, d_out]` and x' the `[d_in, rows]` that the same bytes are in columns.

use std::collections::HashMap;
use std::ffi::{c_int, c_void};
use std::mem::MaybeUninit;

use cudarc::cublaslt::sys as lt;
use cudarc::driver::sys as cu;

use super::super::{DeviceError, Elem, GemmOut, GemmShape};
use super::api::CublasLt;

/// Scratch memory of a stream that computes products, bytes.
pub(super) const WORKSPACE_BYTES: usize = 32 << 20;

/// Alignment of operands that plans rely on, bytes.
pub(super) const ALIGNMENT: u64 = 16;

/// `CUBLAS_OP_T`, which the bindings of cuBLASLt leave out.
static TRANSPOSED: i32 = 1;

/// Most algorithms that the library is asked for.
const CANDIDATES: usize = 8;

/// An algorithm that the library proposes. The same bytes as `cublasLtMatmulHeuristicResult_t`, with the status as a number.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct Candidate {
    algo: lt::cublasLtMatmulAlgo_t,
    workspace_bytes: usize,
    state: c_int,
    waves: f32,
    reserved: [c_int; 4],
}

const _: () = assert!(size_of::<Candidate>() == size_of::<lt::cublasLtMatmulHeuristicResult_t>());

/// Descriptors of a shape and the algorithm that was chosen.
#[derive(Clone, Copy, Debug)]
pub(super) struct Plan {
    pub(super) shape: GemmShape,
    product: lt::cublasLtMatmulDesc_t,
    weight: lt::cublasLtMatrixLayout_t,
    x: lt::cublasLtMatrixLayout_t,
    y: lt::cublasLtMatrixLayout_t,
    pub(super) choice: Candidate,
}

impl Plan {
    const fn empty(shape: GemmShape) -> Self {
        let (product, layout) = (std::ptr::null_mut(), std::ptr::null_mut());
        let choice = Candidate {
            algo: lt::cublasLtMatmulAlgo_t { data: [0; 8] },
            workspace_bytes: 0,
            state: 0,
            waves: 0.0,
            reserved: [0; 4],
        };
        Self { shape, product, weight: layout, x: layout, y: layout, choice }
    }

    /// The same with another algorithm.
    pub(super) const fn with(self, choice: Candidate) -> Self {
        Self { choice, ..self }
    }
}

/// Where a product's operands are.
#[derive(Clone, Copy, Debug)]
pub(super) struct Operands {
    pub(super) y: u64,
    pub(super) x: u64,
    pub(super) weight: u64,
    pub(super) workspace: u64,
}

/// The library and all plans.
#[derive(Debug)]
pub(super) struct Products {
    api: CublasLt,
    handle: lt::cublasLtHandle_t,
    pub(super) plans: Vec<Plan>,
    pub(super) by_shape: HashMap<GemmShape, usize>,
}

impl Products {
    /// Starts the library in the current CUDA context.
    pub(super) fn new(api: CublasLt) -> Result<Self, DeviceError> {
        let mut handle = std::ptr::null_mut();
        // SAFETY: a place for the handle.
        api.check("cublasLtCreate", unsafe { (api.cublasLtCreate)(&raw mut handle) })?;
        Ok(Self { api, handle, plans: Vec::new(), by_shape: HashMap::new() })
    }

    /// Describes a shape and asks the library how to compute it, best first. The first answer is the plan's choice; nothing
    /// is kept yet.
    pub(super) fn describe(&self, shape: GemmShape) -> Result<(Plan, Vec<Candidate>), DeviceError> {
        let mut plan = Descriptors { api: self.api, plan: Plan::empty(shape) };
        plan.make()?;
        let candidates = self.candidates(&plan.plan)?;
        let Some(first) = candidates.first() else {
            return Err(DeviceError::Unsupported(format!("cuBLASLt has no algorithm for {shape:?}")));
        };
        plan.plan.choice = *first;
        Ok((plan.keep(), candidates))
    }

    /// Keeps a plan and returns its number.
    pub(super) fn keep(&mut self, plan: Plan) -> usize {
        self.plans.push(plan);
        self.by_shape.insert(plan.shape, self.plans.len() - 1);
        self.plans.len() - 1
    }

    /// Computes a product on a stream.
    ///
    /// # Safety
    /// The operands are what the plan's shape says and live until the stream has done it; the workspace is the stream's own.
    pub(super) unsafe fn run(&self, plan: &Plan, operands: Operands, stream: cu::CUstream) -> Result<(), DeviceError> {
        let Operands { y, x, weight, workspace } = operands;
        let (one, zero) = (1.0f32, 0.0f32);
        let pointer = |address: u64| address as *mut c_void;
        // SAFETY: passed on; the scalars are on the host, which is the default, and are read before the call returns.
        let code = unsafe {
            (self.api.cublasLtMatmul)(
                self.handle,
                plan.product,
                (&raw const one).cast(),
                pointer(weight),
                plan.weight,
                pointer(x),
                plan.x,
                (&raw const zero).cast(),
                pointer(y),
                plan.y,
                pointer(y),
                plan.y,
                &raw const plan.choice.algo,
                pointer(workspace),
                WORKSPACE_BYTES,
                stream.cast(),
            )
        };
        self.api.check("cublasLtMatmul", code)
    }

    fn candidates(&self, plan: &Plan) -> Result<Vec<Candidate>, DeviceError> {
        let preference = Preference::new(self.api)?;
        let mut answers = [const { MaybeUninit::<Candidate>::zeroed() }; CANDIDATES];
        let mut count: c_int = 0;
        // SAFETY: all descriptors were made by the library; there is room for as many answers as are asked for.
        let code = unsafe {
            (self.api.cublasLtMatmulAlgoGetHeuristic)(
                self.handle,
                plan.product,
                plan.weight,
                plan.x,
                plan.y,
                plan.y,
                preference.handle,
                CANDIDATES as c_int,
                answers.as_mut_ptr().cast(),
                &raw mut count,
            )
        };
        if code == lt::cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED as c_int {
            return Ok(Vec::new());
        }
        self.api.check("cublasLtMatmulAlgoGetHeuristic", code)?;
        let count = usize::try_from(count).unwrap_or(0).min(CANDIDATES);
        // SAFETY: plain numbers, zero where the library wrote nothing.
        let answers = answers[..count].iter().map(|answer| unsafe { answer.assume_init() });
        let fits = |answer: &Candidate| answer.state == 0 && answer.workspace_bytes <= WORKSPACE_BYTES;
        Ok(answers.filter(|answer| fits(answer) && self.is_repeatable(answer)).collect())
    }

    /// Whether partial sums are added in an order that does not depend on which block comes first. One that does not tell
    /// is taken for repeatable: it cuts nothing.
    fn is_repeatable(&self, candidate: &Candidate) -> bool {
        let (mut scheme, mut written) = (0u32, 0usize);
        // SAFETY: the algorithm came from the library; the attribute is a u32.
        let code = unsafe {
            (self.api.cublasLtMatmulAlgoConfigGetAttribute)(
                &raw const candidate.algo,
                lt::cublasLtMatmulAlgoConfigAttributes_t::CUBLASLT_ALGO_CONFIG_REDUCTION_SCHEME,
                (&raw mut scheme).cast(),
                size_of::<u32>(),
                &raw mut written,
            )
        };
        code != 0 || scheme & !ALLOWED_REDUCTIONS == 0
    }
}

impl Drop for Products {
    fn drop(&mut self) {
        for plan in std::mem::take(&mut self.plans) {
            drop(Descriptors { api: self.api, plan });
        }
        // SAFETY: made in `new`; what it computes was waited for.
        unsafe { (self.api.cublasLtDestroy)(self.handle) };
    }
}

/// How an algorithm that cuts `d_in` may add the parts: in f32 from the workspace. In place depends on the order in which
/// blocks come; in the output's type loses bits.
const ALLOWED_REDUCTIONS: u32 = lt::cublasLtReductionScheme_t::CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE as u32;

/// A plan whose descriptors go when it is dropped.
struct Descriptors {
    api: CublasLt,
    plan: Plan,
}

impl Descriptors {
    fn make(&mut self) -> Result<(), DeviceError> {
        let GemmShape { rows, d_out, d_in, elem, out } = self.plan.shape;
        let f32_type = lt::cudaDataType_t::CUDA_R_32F;
        let elem_type = match elem {
            Elem::Bf16 => lt::cudaDataType_t::CUDA_R_16BF,
            Elem::F16 => lt::cudaDataType_t::CUDA_R_16F,
        };
        let out_type = if out == GemmOut::F32 { f32_type } else { elem_type };
        let sums = lt::cublasComputeType_t::CUBLAS_COMPUTE_32F;
        let (api, plan) = (self.api, &mut self.plan);
        let (rows, d_out, d_in) = (rows as u64, d_out as u64, d_in as u64);
        // SAFETY: places for handles, and an attribute of the size that the library documents.
        unsafe {
            let code = (api.cublasLtMatmulDescCreate)(&raw mut plan.product, sums, f32_type);
            api.check("cublasLtMatmulDescCreate", code)?;
            let code = (api.cublasLtMatmulDescSetAttribute)(
                plan.product,
                lt::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSA,
                (&raw const TRANSPOSED).cast(),
                size_of::<i32>(),
            );
            api.check("cublasLtMatmulDescSetAttribute", code)?;
            for (layout, kind, height, width) in [
                (&raw mut plan.weight, elem_type, d_in, d_out),
                (&raw mut plan.x, elem_type, d_in, rows),
                (&raw mut plan.y, out_type, d_out, rows),
            ] {
                let code = (api.cublasLtMatrixLayoutCreate)(layout, kind, height, width, height as i64);
                api.check("cublasLtMatrixLayoutCreate", code)?;
            }
        }
        Ok(())
    }

    fn keep(self) -> Plan {
        std::mem::ManuallyDrop::new(self).plan
    }
}

impl Drop for Descriptors {
    fn drop(&mut self) {
        // SAFETY: made by the library and used by nobody else.
        unsafe {
            for layout in [self.plan.weight, self.plan.x, self.plan.y] {
                if !layout.is_null() {
                    (self.api.cublasLtMatrixLayoutDestroy)(layout);
                }
            }
            if !self.plan.product.is_null() {
                (self.api.cublasLtMatmulDescDestroy)(self.plan.product);
            }
        }
    }
}

/// What an algorithm may use.
struct Preference {
    api: CublasLt,
    handle: lt::cublasLtMatmulPreference_t,
}

impl Preference {
    fn new(api: CublasLt) -> Result<Self, DeviceError> {
        use lt::cublasLtMatmulPreferenceAttributes_t as Attribute;
        let mut handle = std::ptr::null_mut();
        // SAFETY: a place for the handle.
        let code = unsafe { (api.cublasLtMatmulPreferenceCreate)(&raw mut handle) };
        api.check("cublasLtMatmulPreferenceCreate", code)?;
        let this = Self { api, handle };
        this.set(Attribute::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &WORKSPACE_BYTES)?;
        this.set(Attribute::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &ALLOWED_REDUCTIONS)?;
        for alignment in [
            Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES,
            Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
            Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES,
            Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES,
        ] {
            this.set(alignment, &(ALIGNMENT as u32))?;
        }
        Ok(this)
    }

    fn set<T>(&self, attribute: lt::cublasLtMatmulPreferenceAttributes_t, value: &T) -> Result<(), DeviceError> {
        // SAFETY: the value has the type that the library documents for the attribute and is copied.
        let code = unsafe {
            let value = std::ptr::from_ref(value).cast();
            (self.api.cublasLtMatmulPreferenceSetAttribute)(self.handle, attribute, value, size_of::<T>())
        };
        self.api.check("cublasLtMatmulPreferenceSetAttribute", code)
    }
}

impl Drop for Preference {
    fn drop(&mut self) {
        // SAFETY: made in `new`.
        unsafe { (self.api.cublasLtMatmulPreferenceDestroy)(self.handle) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::libraries::open_cublas_lt;
    use crate::device::testing::{library_paths, or_skip};

    /// Only choosing and computing need a GPU: what describes them is checked by the real library here.
    #[test]
    fn the_real_library_takes_our_descriptors_without_a_gpu() {
        let found = or_skip(open_cublas_lt(&library_paths()), "LORAMUX_REQUIRE_CUBLASLT");
        let Some(library) = found else { return };
        let (api, version) = CublasLt::bind(&library).unwrap();
        println!("{} {version}", library.found.path.display());
        assert!(version.starts_with("12.") || version.starts_with("13."), "{version}");
        // SAFETY: asks the loader and keeps nothing; what was opened by path is found by name from now on.
        assert!(unsafe { lt::is_culib_present() });
        for out in [GemmOut::Elem, GemmOut::F32] {
            for elem in [Elem::Bf16, Elem::F16] {
                let shape = GemmShape { rows: 5, d_out: 48, d_in: 64, elem, out };
                let mut descriptors = Descriptors { api, plan: Plan::empty(shape) };
                descriptors.make().unwrap();
                assert!(!descriptors.plan.product.is_null() && !descriptors.plan.y.is_null());
            }
        }
        let preference = Preference::new(api).unwrap();
        use lt::cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES as WORKSPACE;
        let wrong = preference.set(WORKSPACE, &1u8).unwrap_err();
        assert!(matches!(&wrong, DeviceError::Call { code: 7, message, .. } if !message.is_empty()), "{wrong}");
    }
}
